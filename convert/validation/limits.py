"""The gate's limits one by one: (limit, whether it is kept, what was seen). Structure names the tensor or the key,
numbers name the layer and the part."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from dgq.convert.validation.gate import Gate, Json, Line, differences
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.shape.names import layer_of

INSIDE = {".self_attn.": "attention", ".mlp.": "dense MLP", ".experts.": "experts"}  # a layer's tensors -> its part
CONDITIONED = 3  # times the KL without self-conditioning: then it is to blame


def judged(gate: Gate, found: Json) -> list[Json]:
    """Every limit held against an artifact's part of the report: {"limit", "ok", "said"} each, ok None if there was
    nothing to hold it against."""
    return [
        {"limit": limit, "ok": ok, "said": said}
        for check in (structure, weights, layers, fixed, free, cost)
        for limit, ok, said in check(gate, found)
    ]


def structure(gate: Gate, found: Json) -> Iterator[Line]:
    limit = gate.structure
    if limit.same_config:
        yield _same("structure.same_config", "config", found["source"]["config"], found["config"])
    if limit.same_sampler:
        yield _same("structure.same_sampler", "sampler", found["source"]["generation"], found["generation"])
    for pattern in limit.keep:
        wrong = [(n, s) for n, s in found["schemes"].items() if fnmatchcase(n, pattern) and stored_bits(s) < 16]
        said = f"{wrong[0][0]} is in {wrong[0][1]} ({len(wrong)} such)" if wrong else "in 16 bit or more"
        yield f"structure.keep {pattern}", not wrong, said
    if limit.plain_error is not None:
        yield _plain(limit.plain_error, found)
    for key, value, least in (
        ("quantized_share", found["quantized_share"], limit.quantized_share),
        ("experts_share", found["experts_share"], limit.experts_share),
    ):
        if least is not None:
            yield f"structure.{key} >= {least:g}", value >= least - 1e-9, f"{value:.2%} of {_of(key)} quantised"


def _of(key: str) -> str:
    return "the parameters" if key == "quantized_share" else "the routed experts' parameters"


def _same(limit: str, what: str, ours: Json, theirs: Json) -> Line:
    ours, theirs = ({**side, "eos_ids": sorted(side["eos_ids"])} for side in (ours, theirs))  # whatever their order
    differ = list(differences(ours, theirs))
    said = "; ".join(f"{what}: {key} is {b}, the source's is {a}" for key, a, b in differ[:3])
    return limit, not differ, said or "as the source's"


def _plain(limit: float, found: Json) -> Line:
    """Tensors that were not quantised are what they were."""
    key = f"structure.plain_error <= {limit:g}"
    if found.get("weights") is None:
        return key, None, "not checked: no BF16 weights at hand"
    rows = [row for row in found["weights"] if stored_bits(row["scheme"]) >= 16]
    wrong = [row for row in rows if not row["error"] <= limit]
    if not wrong:
        return key, True, f"{len(rows)} tensors are the source's"
    worst = wrong[0]
    return (
        key,
        False,
        f"{worst['tensor']} ({worst['scheme']}) differs from the source's by {worst['error']:.3g}"
        + (f" ({len(wrong)} such)" if len(wrong) > 1 else ""),
    )


def weights(gate: Gate, found: Json) -> Iterator[Line]:
    limit = gate.weights
    wanted = [key for key in ("error", "expert_error", "gain") if getattr(limit, key) is not None]
    rows = found.get("weights")
    if rows is None:
        yield from ((f"weights.{key}", None, "not checked: no BF16 weights at hand") for key in wanted)
        return
    if limit.error is not None:
        worst = max(rows, key=lambda row: _nan_high(row["error"]))
        said = f"{worst['tensor']} ({worst['scheme']}): {worst['error']:.3g}"
        yield f"weights.error <= {limit.error:g}", worst["error"] <= limit.error, said
    if limit.expert_error is not None:
        routed = [row for row in rows if row["worst_expert"] is not None]
        worst = max(routed, key=lambda row: _nan_high(row["worst_error"]))
        said = f"{worst['tensor']} ({worst['scheme']}), expert {worst['worst_expert']}: {worst['worst_error']:.3g}"
        yield f"weights.expert_error <= {limit.expert_error:g}", worst["worst_error"] <= limit.expert_error, said
    if limit.gain is not None:
        low, high = limit.gain
        worst = max(rows, key=lambda row: max(low / max(row["gain_low"], 1e-9), row["gain_high"] / high))
        seen = (
            worst["gain_low"] if low / max(worst["gain_low"], 1e-9) > worst["gain_high"] / high else worst["gain_high"]
        )
        said = f"{worst['tensor']} ({worst['scheme']}): a block is {seen:.3g} times the source's"
        yield f"weights.gain {low:g} to {high:g}", low <= worst["gain_low"] and worst["gain_high"] <= high, said


def layers(gate: Gate, found: Json) -> Iterator[Line]:
    limit, rows = gate.layers, found.get("layers")
    if rows is None:
        wanted = [key for key in ("error", "plain_error", "router_overlap") if getattr(limit, key) is not None]
        yield from ((f"layers.{key}", None, "not checked: no BF16 weights at hand") for key in wanted)
        return
    if limit.error is not None:
        row, part = _worst_part(rows)
        said = f"layer {row['layer']}, {part}: output is off by {row[part]:.3g}"
        yield f"layers.error <= {limit.error:g}", row[part] <= limit.error, said
    if limit.plain_error is not None:
        yield _plain_parts(limit.plain_error, found, rows)
    if limit.router_overlap is not None:
        row = min(rows, key=lambda row: row["router_overlap"])
        said = f"layer {row['layer']}, router: {row['router_overlap']:.2%} of the chosen experts are the source's"
        yield f"layers.router_overlap >= {limit.router_overlap:g}", row["router_overlap"] >= limit.router_overlap, said


def _plain_parts(limit: float, found: Json, rows: list[Json]) -> Line:
    """A part whose weights are the source's has the source's output, unless it is computed otherwise."""
    key = f"layers.plain_error <= {limit:g}"
    quantised = {
        (layer_of(name), part)
        for name, scheme in found["schemes"].items()
        for inside, part in INSIDE.items()
        if inside in name and stored_bits(scheme) < 16
    }
    plain = [(row, part) for row in rows for part in INSIDE.values() if (row["layer"], part) not in quantised]
    wrong = [(row, part) for row, part in plain if not row[part] <= limit]
    if not wrong:
        return key, True, f"{len(plain)} parts without quantised weights" if plain else "every part is quantised"
    row, part = wrong[0]
    said = f"layer {row['layer']}, {part}: no weight is quantised, but the output is off by {row[part]:.3g}"
    return key, False, said + (f" ({len(wrong)} such)" if len(wrong) > 1 else "")


def _worst_part(rows: list[Json]) -> tuple[Json, str]:
    return max(((row, part) for row in rows for part in INSIDE.values()), key=lambda one: _nan_high(one[0][one[1]]))


def fixed(gate: Gate, found: Json) -> Iterator[Line]:
    limit, fixed = gate.fixed, found["fixed"]
    for level, most in limit.kl.items():
        rows = {f"{float(key):g}": row for key, row in fixed["by_level"].items()}
        if f"{float(level):g}" not in rows:
            yield f"fixed.kl.{level}", None, f"not checked: noise levels are {', '.join(rows)}"
            continue
        kl = rows[f"{float(level):g}"]["both"]["kl"]
        yield f"fixed.kl at noise {level} <= {most:g}", kl[0] <= most, f"KL {_triple(kl)} nats{_where(found)}"
    mean = fixed["mean"]
    if limit.kl_mean is not None:
        kl = mean["kl"]
        yield f"fixed.kl_mean <= {limit.kl_mean:g}", kl[0] <= limit.kl_mean, f"KL {_triple(kl)} nats{_where(found)}"
    for key in ("top1", "accepted_ratio"):
        least = getattr(limit, key)
        if least is not None:
            yield f"fixed.{key} >= {least:g}", mean[key][0] >= least, f"{_triple(mean[key])}{_where(found)}"
    if limit.conditioned_ratio is not None:
        plain, given = (fixed["by_condition"][name]["kl"][0] for name in ("plain", "conditioned"))
        ratio = given / plain if plain > 0 else 1.0 if given <= 1e-9 else float("inf")
        said = f"self-conditioning: KL {given:.3g} with it, {plain:.3g} without, {ratio:.3g} times"
        yield f"fixed.conditioned_ratio <= {limit.conditioned_ratio:g}", ratio <= limit.conditioned_ratio, said


def _where(found: Json) -> str:
    """The layer and part that loses most, for who reads that KL is too high."""
    plain, given = (found["fixed"]["by_condition"][name]["kl"][0] for name in ("plain", "conditioned"))
    if given > CONDITIONED * plain:
        return " (most is lost in self-conditioning)"
    if not found.get("layers"):
        return ""
    row, part = _worst_part(found["layers"])
    return f" (most is lost in layer {row['layer']}, {part})"


def free(gate: Gate, found: Json) -> Iterator[Line]:
    ran = found["free"]
    for key, name in (("steps_ratio", "steps_ratio"), ("early_drop", "early_drop"), ("task_drop", "score_drop")):
        most = getattr(gate.free, key)
        if most is None:
            continue
        triple = ran.get(name)
        if triple is None:
            yield f"free.{key} <= {most:g}", None, "not checked: no question has an exact answer"
        else:
            yield f"free.{key} <= {most:g}", triple[1] <= most, _triple(triple)


def cost(gate: Gate, found: Json) -> Iterator[Line]:
    limit, seen = gate.cost, found["cost"]
    if limit.size_ratio is not None:
        ratio = found["bytes"] / found["source"]["bytes"]
        yield (
            f"cost.size_ratio <= {limit.size_ratio:g}",
            ratio <= limit.size_ratio,
            f"{ratio:.3f} of the source's bytes",
        )
    if limit.vram_gib is not None:
        gib = seen["peak_bytes"] / 2**30
        on_gpu = found["device"] == "cuda"
        said = f"{gib:.2f} GiB at the peak" if on_gpu else "not checked: no GPU"
        yield f"cost.vram_gib <= {limit.vram_gib:g}", gib <= limit.vram_gib if on_gpu else None, said
    if limit.step_ratio is not None:
        base = found["source"]["cost"]["step_ms"]
        ratio = seen["step_ms"] / base
        yield f"cost.step_ratio <= {limit.step_ratio:g}", ratio <= limit.step_ratio, f"{ratio:.3f} of BF16's ms a step"


def _triple(values: list[float]) -> str:
    return f"{values[0]:.4g} ({values[1]:.4g} to {values[2]:.4g})"


def _nan_high(value: float) -> float:
    return value if value == value else float("inf")
