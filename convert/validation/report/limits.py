"""The gate's limits one by one, each held against an artifact's result.

    Gate + ArtifactResult + the reference's description  ->  LimitCheck(limit, ok, observed), in the gate's order

Structure comes first: what a quantisation may not change is compared with the source, and what differs is named. A
broken limit on numbers names the layer and the part. A limit that this run has no number for (no GPU, no BF16 weights
at hand) has ok None and is reported as unchecked; it never passes in silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from dgq.convert.validation.report.gate import Gate
from dgq.convert.validation.report.result import ArtifactResult, Interval, LayerError, LimitCheck
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.shape.names import layer_of, part_of

# What part_of() calls a part of a layer -> what LayerError calls it; of these the outputs are compared.
PARTS = {"attention": "attention", "dense MLP": "dense MLP", "routed experts": "experts"}
CONDITIONED = 3  # times the KL without self-conditioning: from there on self-conditioning is named as the cause
NO_SOURCE = "not checked: no BF16 weights at hand"
Checks = Iterator[LimitCheck]


def check_limits(gate: Gate, one: ArtifactResult, reference: Mapping[str, Any]) -> tuple[LimitCheck, ...]:
    """Hold every limit of the gate against an artifact. reference: what is known of the model that it was made of, with
    its "config", "generation", "bytes" and "cost"."""
    checks = (
        _structure(gate, one, reference), _weights(gate, one), _layers(gate, one), _fixed(gate, one), _free(gate, one),
        _cost(gate, one, reference),
    )  # fmt: skip
    return tuple(check for section in checks for check in section)


def _structure(gate: Gate, one: ArtifactResult, reference: Mapping[str, Any]) -> Checks:
    limit = gate.structure
    if limit.same_config:
        yield _same("structure.same_config", "config", reference["config"], one.config)
    if limit.same_sampler:
        yield _same("structure.same_sampler", "sampler", reference["generation"], one.generation)
    for pattern in limit.keep:
        wrong = [(n, s) for n, s in one.schemes.items() if fnmatchcase(n, pattern) and stored_bits(s) < 16]
        observed = f"{wrong[0][0]} is in {wrong[0][1]} ({len(wrong)} such)" if wrong else "in 16 bit or more"
        yield LimitCheck(f"structure.keep {pattern}", not wrong, observed)
    if limit.plain_error is not None:
        yield _plain_tensors(limit.plain_error, one)
    for key, share, least, what in (
        ("quantized_share", one.quantized_share, limit.quantized_share, "the parameters"),
        ("experts_share", one.experts_share, limit.experts_share, "the routed experts' parameters"),
    ):
        if least is not None:
            observed = f"{share:.2%} of {what} quantised"
            yield LimitCheck(f"structure.{key} >= {least:g}", share >= least - 1e-9, observed)


def _same(limit: str, what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> LimitCheck:
    ours, theirs = ({**side, "eos_ids": sorted(side["eos_ids"])} for side in (ours, theirs))  # whatever their order
    differ = list(differences(ours, theirs))
    observed = "; ".join(f"{what}: {key} is {b}, the source's is {a}" for key, a, b in differ[:3])
    return LimitCheck(limit, not differ, observed or "as the source's")


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each key whose values differ, with ours and theirs. Numbers are compared to the precision of float32."""
    for key in {**ours, **theirs}:
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and a and isinstance(a[0], dict):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from differences(x, y, f"{prefix}{key}.{i}.")
        elif isinstance(a, float | int) and isinstance(b, float | int):
            if not math.isclose(a, b, rel_tol=1e-6):
                yield prefix + key, a, b
        elif a != b:
            yield prefix + key, a, b


def _plain_tensors(limit: float, one: ArtifactResult) -> LimitCheck:
    """Tensors that were not quantised are what they were."""
    key = f"structure.plain_error <= {limit:g}"
    if one.weights is None:
        return LimitCheck(key, None, NO_SOURCE)
    rows = [row for row in one.weights if stored_bits(row.scheme) >= 16]
    wrong = [row for row in rows if not row.error <= limit]
    if not wrong:
        return LimitCheck(key, True, f"{len(rows)} tensors are the source's")
    worst = wrong[0]
    observed = f"{worst.tensor} ({worst.scheme}) differs from the source's by {worst.error:.3g}"
    return LimitCheck(key, False, observed + _such(wrong))


def _such(rows: Sequence[object]) -> str:
    return f" ({len(rows)} such)" if len(rows) > 1 else ""


def _weights(gate: Gate, one: ArtifactResult) -> Checks:
    limit, rows = gate.weights, one.weights
    if rows is None:
        wanted = [key for key in ("error", "expert_error", "gain") if getattr(limit, key) is not None]
        yield from (LimitCheck(f"weights.{key}", None, NO_SOURCE) for key in wanted)
        return
    if limit.error is not None:
        worst = max(rows, key=lambda row: _nan_high(row.error))
        observed = f"{worst.tensor} ({worst.scheme}): {worst.error:.3g}"
        yield LimitCheck(f"weights.error <= {limit.error:g}", worst.error <= limit.error, observed)
    if limit.expert_error is not None:
        worst = max((row for row in rows if row.worst_expert is not None), key=lambda row: _nan_high(row.worst_error))
        observed = f"{worst.tensor} ({worst.scheme}), expert {worst.worst_expert}: {worst.worst_error:.3g}"
        ok = worst.worst_error <= limit.expert_error
        yield LimitCheck(f"weights.expert_error <= {limit.expert_error:g}", ok, observed)
    if limit.gain is not None:
        low, high = limit.gain
        worst = max(rows, key=lambda row: max(low / max(row.gain_low, 1e-9), row.gain_high / high))
        too_low = low / max(worst.gain_low, 1e-9) > worst.gain_high / high
        gain = worst.gain_low if too_low else worst.gain_high
        observed = f"{worst.tensor} ({worst.scheme}): a block is {gain:.3g} times the source's"
        ok = low <= worst.gain_low and worst.gain_high <= high
        yield LimitCheck(f"weights.gain {low:g} to {high:g}", ok, observed)


def _layers(gate: Gate, one: ArtifactResult) -> Checks:
    limit, rows = gate.layers, one.layers
    if rows is None:
        wanted = [key for key in ("error", "plain_error", "router_overlap") if getattr(limit, key) is not None]
        yield from (LimitCheck(f"layers.{key}", None, NO_SOURCE) for key in wanted)
        return
    if limit.error is not None:
        row, part = _worst_part(rows)
        observed = f"layer {row.layer}, {part}: output is off by {row.of(part):.3g}"
        yield LimitCheck(f"layers.error <= {limit.error:g}", row.of(part) <= limit.error, observed)
    if limit.plain_error is not None:
        yield _plain_parts(limit.plain_error, one, rows)
    if limit.router_overlap is not None:
        row = min(rows, key=lambda row: row.router_overlap)
        observed = f"layer {row.layer}, router: {row.router_overlap:.2%} of the chosen experts are the source's"
        ok = row.router_overlap >= limit.router_overlap
        yield LimitCheck(f"layers.router_overlap >= {limit.router_overlap:g}", ok, observed)


def _plain_parts(limit: float, one: ArtifactResult, rows: Sequence[LayerError]) -> LimitCheck:
    """A part whose weights are the source's has the source's output, unless it is computed otherwise."""
    key = f"layers.plain_error <= {limit:g}"
    below = [name for name, scheme in one.schemes.items() if stored_bits(scheme) < 16]
    quantised = {(layer_of(name), PARTS.get(part_of(name))) for name in below}
    plain = [(row, part) for row in rows for part in PARTS.values() if (row.layer, part) not in quantised]
    wrong = [(row, part) for row, part in plain if not row.of(part) <= limit]
    if not wrong:
        observed = f"{len(plain)} parts without quantised weights" if plain else "every part is quantised"
        return LimitCheck(key, True, observed)
    row, part = wrong[0]
    observed = f"layer {row.layer}, {part}: no weight is quantised, but the output is off by {row.of(part):.3g}"
    return LimitCheck(key, False, observed + _such(wrong))


def _worst_part(rows: Sequence[LayerError]) -> tuple[LayerError, str]:
    return max(((row, part) for row in rows for part in PARTS.values()), key=lambda one: _nan_high(one[0].of(one[1])))


def _fixed(gate: Gate, one: ArtifactResult) -> Checks:
    limit, fixed = gate.fixed, one.fixed
    rows = {f"{float(key):g}": row for key, row in fixed.by_level.items()}
    for level, most in limit.kl.items():
        if (row := rows.get(f"{float(level):g}")) is None:
            yield LimitCheck(f"fixed.kl.{level}", None, f"not checked: noise levels are {', '.join(rows)}")
            continue
        kl = row.both.kl
        observed = f"KL {_triple(kl)} nats{_where(one)}"
        yield LimitCheck(f"fixed.kl at noise {level} <= {most:g}", kl.figure <= most, observed)
    if limit.kl_mean is not None:
        kl = fixed.mean.kl
        observed = f"KL {_triple(kl)} nats{_where(one)}"
        yield LimitCheck(f"fixed.kl_mean <= {limit.kl_mean:g}", kl.figure <= limit.kl_mean, observed)
    for key in ("top1", "accepted_ratio"):
        least, value = getattr(limit, key), getattr(fixed.mean, key)
        if least is not None:
            yield LimitCheck(f"fixed.{key} >= {least:g}", value.figure >= least, f"{_triple(value)}{_where(one)}")
    if limit.conditioned_ratio is not None:
        plain, given = _kl_by_condition(one)
        ratio = given / plain if plain > 0 else 1.0 if given <= 1e-9 else float("inf")
        observed = f"self-conditioning: KL {given:.3g} with it, {plain:.3g} without, {ratio:.3g} times"
        key = f"fixed.conditioned_ratio <= {limit.conditioned_ratio:g}"
        yield LimitCheck(key, ratio <= limit.conditioned_ratio, observed)


def _kl_by_condition(one: ArtifactResult) -> tuple[float, float]:
    """KL in nats without self-conditioning and with it."""
    by = one.fixed.by_condition
    return by.plain.kl.figure, by.conditioned.kl.figure


def _where(one: ArtifactResult) -> str:
    """The layer and part that loses most, for whoever reads that KL is too high."""
    plain, given = _kl_by_condition(one)
    if given > CONDITIONED * plain:
        return " (most is lost in self-conditioning)"
    if not one.layers:
        return ""
    row, part = _worst_part(one.layers)
    return f" (most is lost in layer {row.layer}, {part})"


def _free(gate: Gate, one: ArtifactResult) -> Checks:
    for key, interval in (
        ("steps_ratio", one.free.steps_ratio), ("early_drop", one.free.early_drop), ("task_drop", one.free.score_drop),
    ):  # fmt: skip
        most = getattr(gate.free, key)
        if most is None:
            continue
        if interval is None:
            yield LimitCheck(f"free.{key} <= {most:g}", None, "not checked: no question has an exact answer")
        else:
            yield LimitCheck(f"free.{key} <= {most:g}", interval.low <= most, _triple(interval))


def _cost(gate: Gate, one: ArtifactResult, reference: Mapping[str, Any]) -> Checks:
    limit = gate.cost
    if limit.size_ratio is not None:
        ratio = one.bytes / reference["bytes"]
        observed = f"{ratio:.3f} of the source's bytes"
        yield LimitCheck(f"cost.size_ratio <= {limit.size_ratio:g}", ratio <= limit.size_ratio, observed)
    if limit.vram_gib is not None:
        gib = one.cost.peak_bytes / 2**30
        on_gpu = one.device == "cuda"
        observed = f"{gib:.2f} GiB at the peak" if on_gpu else "not checked: no GPU"
        yield LimitCheck(f"cost.vram_gib <= {limit.vram_gib:g}", gib <= limit.vram_gib if on_gpu else None, observed)
    if limit.step_ratio is not None:
        ratio = one.cost.step_ms / reference["cost"]["step_ms"]
        observed = f"{ratio:.3f} of BF16's ms a step"
        yield LimitCheck(f"cost.step_ratio <= {limit.step_ratio:g}", ratio <= limit.step_ratio, observed)


def _triple(values: Interval) -> str:
    return f"{values.figure:.4g} ({values.low:.4g} to {values.high:.4g})"


def _nan_high(value: float) -> float:
    return value if value == value else float("inf")
