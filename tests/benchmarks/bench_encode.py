"""How fast weights are encoded: each scheme on one core beside its reference, on a slice of the real 26B.

    python tests/benchmarks/bench_encode.py [--peers] [--layer 0] [--experts 8] [--embedding-rows 16384] [--full]
        [--runs 5]
    python tests/benchmarks/bench_encode.py --device cuda
        ours alone, held to the CPU's bytes on one slice of each tensor

The slice: every tensor of one layer, and the embedding, under the schemes that the plans of the 26B give them (for a
scheme that the layer lacks: the first tensor that has it); random BF16 values, only so many experts and rows of the
embedding, all with --full. Ours starts from BF16, as `dgq convert` does. ggml is its C code, ggml_quantize_chunk, from
float32 made beforehand; "from bf16" adds that conversion. Peers, which need their packages: bitsandbytes'
quantize_4bit and modelopt's NVFP4QTensor, on the CPU from BF16. Sides take turns slice by slice; figures are medians of
the runs in million weights a second of thread CPU time (on a GPU: of wall time); the JSON line at the end has both.
Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from sparse26b import write_sparse_26b

from dgq.convert.cli.__main__ import main as dgq
from dgq.convert.write.slices import SLICE
from dgq.quant.schemes.ggml.blocks import GGMLScheme, _quantize_chunk
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme

RECIPES = {"q4_k_m": "gguf", "nvfp4": "nvfp4", "bnb4": "bnb4", "bnb4-dq": "bnb4"}
Parts = dict[str, torch.Tensor]
Work = Callable[[], Parts]


@dataclass
class Times:
    """Seconds of one side: of each run, summed over slices."""

    cpu: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    wall: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def measure(self, run: int, work: Work, device: str) -> Parts:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        self.cpu[run] += time.thread_time() - cpu
        self.wall[run] += time.perf_counter() - wall
        return result

    def rates(self, numel: int) -> dict[str, float]:
        """Million weights a second, by CPU and by wall time."""
        medians = {clock: statistics.median(getattr(self, clock).values()) for clock in ("cpu", "wall")}
        return {clock: numel / 1e6 / seconds for clock, seconds in medians.items()}


def plans() -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        source = write_sparse_26b(Path(folder) / "diffusiongemma-26B-A4B-it")
        found = {}
        for recipe, to in RECIPES.items():
            result = CliRunner().invoke(dgq, ["plan", str(source), "--to", to, "--recipe", recipe, "--json"])
            assert result.exit_code == 0, (result.output, result.exception)
            found[recipe] = json.loads(result.stdout)
    return found


def chosen(plan: dict[str, Any], layer: int) -> dict[str, list[tuple[int, ...]]]:
    """scheme -> shapes of the layer's tensors and the embedding; or of the first tensor elsewhere that has it."""
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    others: dict[str, tuple[int, ...]] = {}
    for name, tensor in plan["tensors"].items():
        if SCHEMES[tensor["scheme"]].bits >= 16:
            continue
        if f"blk.{layer}." in name or f"decoder.layers.{layer}." in name or "token_embd" in name:
            shapes[tensor["scheme"]].append(tuple(tensor["shape"]))
        else:
            others.setdefault(tensor["scheme"], tuple(tensor["shape"]))
    return {**{scheme: [shape] for scheme, shape in others.items()}, **shapes}


def slices(shape: tuple[int, ...], device: str, whole_matrices: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random weights and importances, in slices as convert takes them."""
    generator = torch.Generator().manual_seed(prod(shape) % 1000)
    row = prod(shape[1:])
    step = shape[0] if whole_matrices and len(shape) == 2 else max(1, SLICE[device] // row)
    for start in range(0, shape[0], step):
        lead = min(step, shape[0] - start)
        weight = (torch.randn(lead, *shape[1:], generator=generator) * 0.02).bfloat16()
        importance = torch.rand(*((lead,) if len(shape) == 3 else ()), shape[-1], generator=generator) ** 4 + 1e-4
        yield weight, importance


def ggml_c(scheme: GGMLScheme, weight: torch.Tensor, importance: torch.Tensor | None) -> Parts:
    """ggml_quantize_chunk and nothing else; weight float32 or converted here."""
    weight, columns = weight.float(), weight.shape[-1]
    out = torch.empty(*weight.shape[:-1], columns // scheme.block * scheme.block_bytes, dtype=torch.uint8)
    each = [(weight, out, importance)]
    if importance is not None and importance.dim() == 2:
        each = list(zip(weight, out, importance, strict=True))
    for source, target, columns_weight in each:
        pointer = None if columns_weight is None else columns_weight.data_ptr()
        rows = source.numel() // columns
        _quantize_chunk()(scheme.ggml.id, source.data_ptr(), target.data_ptr(), 0, rows, columns, pointer)
    return {"": out}


def bitsandbytes(weight: torch.Tensor, double: bool) -> Parts:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double)
    nested = {"nested_absmax": state.state2.absmax, "nested_offset": state.offset} if double else {}
    return {"": packed, "absmax": state.absmax, **nested}


def modelopt(weight: torch.Tensor) -> Parts:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    made = [NVFP4QTensor.quantize(matrix, 16) for matrix in weight.view(-1, *weight.shape[-2:])]
    codes = torch.stack([tensor._quantized_data for tensor, _, _ in made])
    for minus_zero, nibble in ((0x08, 0x0F), (0x80, 0xF0)):  # which it writes, and dgq does not
        codes = torch.where(codes & nibble == minus_zero, codes & ~nibble, codes)
    scales = torch.stack([scale.view(torch.uint8) for _, scale, _ in made])
    return {"": codes, "weight_scale": scales, "weight_scale_2": torch.stack([scale_2 for _, _, scale_2 in made])}


def same(ours: Parts, theirs: Parts) -> bool:
    """Whether the parts that the other side has too hold the same bytes (one scale_2 a matrix: ours is expanded)."""
    for name, right in theirs.items():
        expanded = name == "weight_scale_2" and right.dim() < ours[name].dim()
        left = ours[name][..., 0, 0] if expanded else ours[name]
        pair = [t.cpu().contiguous().flatten().view(torch.uint8) for t in (left, right)]
        if not torch.equal(*pair):
            return False
    return True


def measure(
    scheme: Scheme, shapes: list[tuple[int, ...]], weighed: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """All sides of a scheme on tensors of these shapes."""
    times: dict[str, Times] = defaultdict(Times)
    numel, equal = 0, defaultdict[str, bool](lambda: True)
    for shape in shapes:
        for number, (weight, columns) in enumerate(slices(shape, options.device, scheme.name == "nvfp4")):
            importance = columns if weighed else None
            there = weight.to(options.device), None if importance is None else importance.to(options.device)
            sides: dict[str, Work] = {"ours": partial(scheme.quantize, *there)}
            if options.device == "cuda":
                if number == 0:
                    equal["cpu"] &= same(scheme.quantize(*there), scheme.quantize(weight, importance))
            elif isinstance(scheme, GGMLScheme):
                sides["ggml"] = partial(ggml_c, scheme, weight.float(), importance)
                sides["ggml from bf16"] = partial(ggml_c, scheme, weight, importance)
            elif options.peers and scheme.name == "nvfp4":
                sides["modelopt"] = partial(modelopt, weight)
            elif options.peers:
                sides["bitsandbytes"] = partial(bitsandbytes, weight, scheme.name == "nf4_dq")
            ours = {name: work() for name, work in sides.items()}  # which warms up, too
            for name in sides.keys() - {"ours"}:
                equal[name] &= same(ours["ours"], ours[name])
            for run in range(options.runs):
                first = run % len(sides)
                for name in [*list(sides)[first:], *list(sides)[:first]]:
                    times[name].measure(run, sides[name], options.device)
            numel += weight.numel()
    rates = {name: {k: round(v, 2) for k, v in side.rates(numel).items()} for name, side in times.items()}
    return {"weights": numel, "rates": rates, "equal": dict(equal)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", action="store_true", help="bitsandbytes and modelopt too")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--experts", type=int, default=8, help="of 128")
    parser.add_argument("--embedding-rows", type=int, default=1 << 14, help="of 262,144")
    parser.add_argument("--full", action="store_true", help="all experts and rows")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--schemes", nargs="*", default=[], help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = "wall" if options.device == "cuda" else "cpu"
    figures: dict[str, dict[str, Any]] = {}
    known = plans()
    wanted: dict[str, list[tuple[int, ...]]] = {}
    for plan in known.values():
        wanted |= chosen(plan, options.layer)
    print(f"{'scheme':22}{'M weights':>10}{'ours':>9}   M weights/s of {clock} time; others, and ours over theirs")
    for name, shapes in wanted.items():
        if options.schemes and name not in options.schemes:
            continue
        most = {3: options.experts, 2: options.embedding_rows}
        shapes = [s if options.full else (min(s[0], most.get(len(s), s[0])), *s[1:]) for s in shapes]
        for weighed in (False, True) if isinstance(SCHEMES[name], GGMLScheme) else (False,):
            row = measure(SCHEMES[name], shapes, weighed, options)
            label = name + (", importance" if weighed else "")
            ours = row["rates"]["ours"][clock]
            row["ratio"] = {n: round(ours / r[clock], 3) for n, r in row["rates"].items() if n != "ours"}
            others = "".join(f"   {n} {row['rates'][n][clock]:.1f} ({ratio:.3f})" for n, ratio in row["ratio"].items())
            print(f"{label:22}{row['weights'] / 1e6:10.1f}{ours:9.1f}{others}   equal: {row['equal']}", flush=True)
            figures[label] = row
    projected = {recipe: seconds(plan, figures, clock) for recipe, plan in known.items()}
    print(f"encoding the whole 26B, seconds of one core: {projected}")
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(json.dumps({"processor": name, "torch": torch.__version__, **vars(options), "schemes": figures,
                      "seconds_26b": projected}))  # fmt: skip


def seconds(plan: dict[str, Any], figures: dict[str, Any], clock: str) -> dict[str, float]:
    """side -> core-seconds for all tensors below 16 bits, if the side was measured on all of the recipe's schemes."""
    counts = {name: entry["params"] for name, entry in plan["by_scheme"].items() if SCHEMES[name].bits < 16}
    total: dict[str, float] = {}
    for suffix in ("", ", importance"):
        rows = [(figures.get(name + suffix, {"rates": {}})["rates"], count) for name, count in counts.items()]
        for side in rows[0][0]:
            if all(side in rates for rates, _ in rows):
                total[side + suffix] = round(sum(count / 1e6 / rates[side][clock] for rates, count in rows), 1)
    return total


if __name__ == "__main__":
    main()
