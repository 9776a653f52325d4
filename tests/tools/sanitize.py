"""Launch every Triton kernel of dgq at small shapes, through the functions that dgq calls them by, for a sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/tools/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/tools/sanitize.py

Without torch's cache each tensor is an allocation of its own, so that memcheck sees where it ends; with it a kernel may
run on into the next tensor unseen. But nothing can be captured without it, so a session's CUDA graphs are looked at by

    compute-sanitizer --tool memcheck python tests/tools/sanitize.py --only session

A name is printed before its kernels run, and a JSON line at the end says how often each kernel was launched (a replay
is not seen). Exits with 1 if one was not: kernels are found in the source, not in a list. What they compute is not
looked at here: test_moe, test_dense, test_fused and test_round_kernel do.

--device cpu interprets them, which finds what is wrong with this script (test_sanitize.py), not with the kernels.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EPS = 1e-6
Cases = dict[str, Callable[[], object]]


def kernels() -> dict[str, Any]:
    """file.name -> kernel, of all that the host may launch: functions of @triton.jit that no other one calls."""
    from triton.runtime.jit import KernelInterface

    found, called = {}, set()
    for path in sorted(ROOT.glob("[cqr]*/**/*.py")):
        if "@triton.jit" not in path.read_text("utf-8"):
            continue
        module = importlib.import_module("dgq." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, kernel in vars(module).items():
            if isinstance(kernel, KernelInterface) and kernel.fn.__module__ == module.__name__:
                found[f"{path.stem}.{name}"] = kernel
                tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
                called |= {id(_named(node.func, kernel.fn.__globals__)) for node in ast.walk(tree)
                           if isinstance(node, ast.Call)}  # fmt: skip
    return {name: kernel for name, kernel in found.items() if id(kernel) not in called}


def _named(call: ast.expr, names: dict[str, Any]) -> Any:
    """What a call names: a function of the file, or of a module that the file imports."""
    if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
        return getattr(names.get(call.value.id), call.attr, None)
    return names.get(call.id) if isinstance(call, ast.Name) else None


@contextmanager
def counted(found: dict[str, Any]) -> Iterator[Counter[str]]:
    """How often each is launched meanwhile."""
    launches: Counter[str] = Counter()

    def count(name: str, kernel: Any) -> None:
        run = kernel.run

        def counting(*args: Any, **kwargs: Any) -> Any:
            launches[name] += 1
            return run(*args, **kwargs)

        kernel.run = counting

    for name, kernel in found.items():
        count(name, kernel)
    try:
        yield launches
    finally:
        for kernel in found.values():
            del kernel.run


def cases(device: str) -> Cases:
    """What is run, by name. Shapes fill no tile; where a kernel is cut by its sizes, each cut."""
    return {name: case for group in (_routed, _dense, _layer, _attention, _sampler, _rounding, _session)
            for name, case in group(device)}  # fmt: skip


def _packed(scheme: str, device: str, *shape: int) -> Any:
    import torch

    from dgq.quant.schemes.registry import SCHEMES
    from dgq.quant.types import Packed

    weight = (torch.randn(*shape) * shape[-1] ** -0.5).bfloat16().to(device)
    return Packed(SCHEMES[scheme], shape, SCHEMES[scheme].quantize(weight))


def _normal(device: str, *shape: int, float32: bool = False) -> Any:
    import torch

    return torch.randn(shape).to(torch.float32 if float32 else torch.bfloat16).to(device)


def _columns(scheme: str) -> int:
    return 256 if scheme.endswith("k") else {"nvfp4": 144, "q5_0": 96, "q8_0": 160}.get(scheme, 192)


def _routed(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Tiles of 32, 64 and 128 tokens; experts without tokens."""
    import torch

    from dgq.quant.schemes.registry import SCHEMES
    from dgq.runtime.kernels import moe
    from dgq.runtime.kernels.repack import tile

    def run(scheme: str, tokens: int, k: int, experts: int = 3) -> None:
        hidden = _columns(scheme)
        inner = 256 if scheme.endswith("k") else 64
        weights = (_packed(scheme, device, experts, rows, columns) for rows, columns in
                   ((2 * inner, hidden), (hidden, inner)))  # fmt: skip
        gate_up, down = (tile(weight, gated) for weight, gated in zip(weights, (True, False), strict=True))
        chosen = torch.rand(tokens, experts - 1).argsort(-1)[:, :k].to(device)
        moe.experts(_normal(device, tokens, hidden), chosen, torch.rand(tokens, k).to(device), gate_up, down)

    for scheme in SCHEMES:
        yield f"experts {scheme}", lambda scheme=scheme: run(scheme, 7, 2)
    for tokens in (1, 67, 131):
        yield f"experts nvfp4, {tokens} tokens", lambda tokens=tokens: run("nvfp4", tokens, 2)
    yield "picks beyond a block", lambda: moe.sort(torch.randint(9, (301, 4)).to(device), 10)


def _dense(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Whole and split columns, one token and some, and so many that the weight is decoded; tables."""
    import torch

    from dgq.quant.schemes.registry import SCHEMES
    from dgq.runtime.kernels import dense, fused
    from dgq.runtime.kernels.repack import Tiles, in_order

    def split(scheme: str) -> None:
        weight = dense.pack([_packed(scheme, device, 203, 1024 if scheme.endswith("k") else 576)])
        for tokens, cut in ((21, (16, 1, 4)), (3, (16, 2, 4)), (35, (64, 1, 4))):
            part, x = weight.parts[0], in_order(_normal(device, tokens, weight.shape[1]))
            assert isinstance(part, Tiles)
            dense._product(x, part, torch.empty(tokens, 203, dtype=x.dtype, device=device), False, dense.Cut(*cut))

    def mlp(scheme: str, tokens: int) -> None:
        gate, down = _packed(scheme, device, 72, _columns(scheme)), _packed("bf16", device, _columns(scheme), 72)
        up = gate[torch.arange(71, -1, -1, device=device)]
        weights = dense.pack_gated(gate, up), dense.pack([down])
        dense.gated_mlp(_normal(device, tokens, _columns(scheme)), *weights)

    def many(scheme: str) -> None:
        weight = dense.pack([_packed(scheme, device, 203, _columns(scheme))])
        most, dense.MANY = dense.MANY, 4
        try:
            dense.linear(_normal(device, 9, weight.shape[1]), weight)
            mlp(scheme, 9)
        finally:
            dense.MANY = most

    def table(scheme: str) -> None:
        found = dense.Table.of(_packed(scheme, device, 70, 512))
        found.rows(torch.tensor([0, 69, 33], device=device), 3.0)
        found.head(_normal(device, 5, 512))
        fused.norm(found.soft_embed(torch.rand(5, 70).bfloat16().to(device)), None, EPS)

    for scheme in (scheme for scheme in SCHEMES if scheme not in ("bf16", "f16", "f32")):
        yield f"linear {scheme}", lambda scheme=scheme: split(scheme)
        yield f"mlp {scheme}", lambda scheme=scheme: mlp(scheme, 9)
        yield f"many tokens {scheme}", lambda scheme=scheme: many(scheme)
    yield "mlp bf16", lambda: mlp("bf16", 9)
    for scheme in ("q6_k", "q8_0"):
        yield f"table {scheme}", lambda scheme=scheme: table(scheme)


def _layer(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Norms, routing, rotations and places, of the small width and of the 26B's."""
    import torch

    from dgq.runtime.kernels import fused

    def norms(width: int) -> None:
        x, seen, parts = (_normal(device, *shape) for shape in ((3, width), (3, width), (3, 8, width)))
        weights = [_normal(device, width, float32=True) for _ in range(4)]
        scale, scalar = torch.rand(3, 3, device=device)[:, 1], torch.ones(1, dtype=torch.bfloat16, device=device)
        for ordered in (False, True):
            fused.norm(x, weights[0], EPS, plus=seen, scale=scale, factor=2.0, ordered=ordered)
            fused.mixed(x, seen, tuple(weights[:3]), _normal(device, width), EPS, ordered=ordered)
            fused.fed(x, seen, parts, tuple(weights), scalar, EPS, ordered=ordered)

    def place(heads: int, kv: int, dim: int, paged: bool) -> None:
        rows, tokens, size = 2, 5, 64
        length = torch.tensor([size - 2, 3 * size + 1], dtype=torch.int32, device=device)
        qkv = _normal(device, rows * tokens, (heads + 2 * kv) * dim)
        turns = fused.rotations(length, torch.rand(dim // 2).to(device), tokens)
        pages = torch.randperm(12)[:10].view(2, 5).int().to(device) if paged else None
        buffer = _normal(device, 2, 12 if paged else rows, kv, size, dim)
        norms = _normal(device, dim, float32=True), _normal(device, dim, float32=True)
        q, k, v = qkv.split((heads * dim, kv * dim, kv * dim), -1)
        fused.place(q, k, v, norms, turns, fused.KeyValues(buffer[0], buffer[1], length, pages), EPS)

    for width in (72, 2816):
        yield f"norms {width}", lambda width=width: norms(width)
    for tokens, experts, k in ((5, 128, 8), (9, 30, 1)):
        yield (
            f"route {k} of {experts}",
            lambda n=tokens, e=experts, k=k: fused.route(_normal(device, n, e), _normal(device, e), k),
        )
    for heads, kv, dim in ((3, 1, 32), (16, 8, 256), (16, 2, 512)):
        for paged in (False, True):
            name = f"place {heads} heads of {dim}" + (" in pages" if paged else "")
            yield name, lambda case=(heads, kv, dim, paged): place(*case)


def _attention(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Cut as shipped, for each size of head: of a canvas over a ring that went around, causal, in pages, in parts."""
    import torch

    from dgq.runtime.kernels.cached_attention import KeyValues, Mask, attend

    def run(dim: int, tokens: int, lengths: list[int], paged: bool, mask: Mask, **more: Any) -> None:
        heads, kv, rows = 2, 1, len(lengths)
        size = 64 if paged else 128
        buffer = _normal(device, 2, 3 * rows if paged else rows, kv, size, dim)
        pages = torch.randperm(3 * rows).view(rows, 3).int().to(device) if paged else None
        q = _normal(device, rows, heads, tokens, dim)
        length = torch.tensor(lengths, dtype=torch.int32, device=device)
        attend(q, KeyValues(buffer[0], buffer[1], length, pages), mask, **more)

    for dim in (64, 256, 512):
        begin = torch.tensor([30, 0], dtype=torch.int32, device=device)
        yield f"attend {dim}", lambda dim=dim: run(dim, 21, [0, 200], False, Mask(100), splits=1)
        yield (
            f"attend {dim}, causal, in parts",
            lambda dim=dim: run(dim, 37, [60], False, Mask(40, True), splits=2, ordered=True),
        )
        yield (
            f"attend {dim}, in pages",
            lambda dim=dim, begin=begin: run(dim, 9, [77, 3], True, Mask(start=begin), splits=3),
        )
        reach = torch.zeros(2, 37, dtype=torch.int32, device=device)
        reach[0, 3:20], reach[1, 3:20] = torch.arange(17), torch.arange(16, -1, -1)
        yield (
            f"attend {dim}, over an image",
            lambda dim=dim, reach=reach: run(dim, 37, [40], False, Mask(12, True, reach=reach), splits=1),
        )


def _sampler(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """A step and what it decides, the vocabulary in one slice and in some; the expected embedding of the next."""
    import torch

    from dgq.runtime.kernels import denoising, fused
    from dgq.runtime.shape.settings import SamplerConfig

    def step(rows: int, canvas: int, vocab: int) -> None:
        state = denoising.Denoising.new(rows, canvas, vocab, 30.0, SamplerConfig(), device)
        state.start(7, list(range(rows)))
        denoising.begin(state, torch.ones(rows, dtype=torch.int32, device=device))
        probabilities = torch.empty(rows * canvas, vocab, dtype=torch.bfloat16, device=device)
        for spread in (0.1, 9.0):
            denoising.sample(state, _normal(device, rows, canvas, vocab) * spread, probabilities)
            denoising.decide(state)
        soft = fused.soft_embed(probabilities, _normal(device, vocab, 72))
        fused.norm(soft, None, EPS, scale=state.scale, factor=72**0.5)

    for shape in ((2, 5, 512), (1, 3, 9001)):
        yield f"step over {shape[2]} tokens", lambda shape=shape: step(*shape)


def _rounding(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Error feedback: columns of every grid, and ggml's searches."""
    import torch
    from test_round_kernel import GRIDS

    from dgq.quant.feedback import round_kernel
    from dgq.quant.schemes.ggml import search_kernel

    def columns(name: str) -> None:
        levels, sub = GRIDS[name]
        x = torch.randn(2, 33, sub)
        scale = torch.stack([x.abs().amax(-1) / levels.abs().max() * f for f in (0.9, 1.0)])
        factor = torch.eye(sub) + torch.randn(1, sub, sub).triu(1) / 50
        case = (x, scale, torch.zeros_like(scale), factor, levels)
        round_kernel.round_columns(*(value.to(device) for value in case))

    def search(positions: int) -> None:
        x, weight = torch.randn(positions, 70).to(device), torch.rand(positions, 70).to(device)
        if positions == 16:
            search_kernel.make_qx_quants(32, x, weight)
        else:
            search_kernel.make_qkx_quants(15, x, weight, -0.9, 0.05, 36)

    for name in GRIDS:
        yield f"round {name}", lambda name=name: columns(name)
    for positions in (16, 32):
        yield f"search {positions}", lambda positions=positions: search(positions)


def _session(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps and blocks of a model of two layers, one of whose two rows leaves. On a GPU a pass of each kind runs by
    itself, is captured, and is replayed from then on, in other canvases and at other lengths."""

    def run() -> None:
        import torch
        from test_fast import small

        from dgq.runtime.engine.fast import Fast
        from dgq.runtime.model.loading import LoadOptions
        from dgq.runtime.model.model import Model
        from dgq.runtime.model.rng import CounterRandom
        from dgq.runtime.model.session import Session
        from dgq.runtime.shape.settings import SamplerConfig

        config, weights = small({".experts.": "nvfp4"})
        backend = Fast(Model(config, weights, device, torch.bfloat16, options=LoadOptions(kernels=True)))
        backend.capturable &= "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
        blocks, steps = (3, 3) if device == "cuda" else (1, 1)
        random = CounterRandom(1, range(2), config.canvas, config.vocab, torch.device(device))
        rows = torch.arange(2, device=device)
        with torch.inference_mode():
            session = Session(backend, 2, 21 + blocks * config.canvas, SamplerConfig(steps=steps))
            session.start([[8], [5, 6, 7] * 7])
            for block in range(blocks):
                session.state.begin(random, rows, block)
                for step in range(steps):
                    assert session.step(last=step == steps - 1) is not None, "logits that are no numbers"
                canvas = session.state.argmax[-1:].clone()
                if not block:
                    rows = rows[1:]
                    session.keep(rows)
                session.commit(canvas)
            assert int(session.slots.lengths[0]) == 21 + blocks * config.canvas
            assert len(session._graphs) == (5 if backend.capturable else 0)

    yield "session of two rows", run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Launch every Triton kernel of dgq once, for compute-sanitizer.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--list", action="store_true", help="names of what would run, and of the kernels")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="what has one of these in its name")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.quicken()
    import torch

    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("sanitize: no GPU; --device cpu interprets the kernels", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    found, all_cases = kernels(), cases(chosen.device)
    picked = [name for name in all_cases if not chosen.only or any(word in name for word in chosen.only)]
    if chosen.list or not picked:
        print(*picked, *(f"kernel {name}" for name in found), sep="\n")
        return 0 if picked else 2
    with counted(found) as launches:
        for name in picked:
            print(name, flush=True)
            all_cases[name]()
            if chosen.device == "cuda":
                torch.cuda.synchronize()
    missing = [] if chosen.only else sorted(found.keys() - launches.keys())
    print(json.dumps({"device": chosen.device, "cases": len(picked), "launches": launches, "not_launched": missing}))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
