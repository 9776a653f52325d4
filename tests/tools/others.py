"""An artifact's weights, decoded by others' code from its files: modelopt, bitsandbytes, gguf-py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dgq.runtime.shape.names import hf_name

SCALES = (".weight_scale", ".weight_scale_2", ".input_scale")
STATE = ".quant_state.bitsandbytes__nf4"
MODELOPT = """
import sys
from safetensors.torch import load_file, save_file
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
found = load_file(sys.argv[1])
decoded = {}
for name, packed in found.items():
    if packed.dtype == torch.uint8:
        shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
        own = NVFP4QTensor(shape, torch.float32, packed)
        scales = (found[name + "_scale"], found[name + "_scale_2"])
        decoded[name] = own.dequantize(torch.float32, scale=scales[0], double_scale=scales[1], block_sizes={-1: 16})
save_file({name: weight.contiguous() for name, weight in decoded.items()}, sys.argv[2])
"""


def by_modelopt(path: Path) -> dict[str, Tensor]:
    """In a process of its own: modelopt patches what it imports."""
    out, file = path / "decoded.safetensors", path / "model.safetensors"
    command = [sys.executable, "-c", MODELOPT, str(file), str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    stored, decoded = load_file(file), load_file(out)
    out.unlink()
    whole = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALES)}
    found = {name: decoded.get(name, tensor).float() for name, tensor in whole.items() if ".experts." not in name}
    experts = defaultdict(set)
    for name in decoded:
        owner, routed, rest = name.partition(".experts.")
        if routed:
            experts[owner + routed].add(int(rest.split(".")[0]))
    for owner, numbers in experts.items():
        each = [{p: decoded[f"{owner}{e}.{p}_proj.weight"] for p in ("gate", "up", "down")} for e in sorted(numbers)]
        found[owner + "gate_up_proj"] = torch.stack([torch.cat((one["gate"], one["up"])) for one in each])
        found[owner + "down_proj"] = torch.stack([one["down"] for one in each])
    return found


def by_bitsandbytes(path: Path) -> dict[str, Tensor]:
    from bitsandbytes import functional as bnb

    stored = load_file(path / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        if name + STATE in stored:
            parts = {key.removeprefix(name + "."): value for key, value in stored.items() if key.startswith(name + ".")}
            state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
            state.dtype = torch.float32
            found[name] = bnb.dequantize_4bit(tensor.view(-1, 1), state)
        elif not any(part in name for part in (".absmax", ".quant", ".nested_")):
            found[name] = tensor.float()
    return found


def by_gguf(path: Path) -> dict[str, Tensor]:
    found = {}
    for tensor in gguf.GGUFReader(next(path.glob("*.gguf"))).tensors:
        name = hf_name(tensor.name)
        if name is not None:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            shape = tensor.shape.tolist()[::-1]
            found[name] = torch.from_numpy(np.array(values)).view(shape)
    return found


DECODED: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "nvfp4": by_modelopt, "bnb4": by_bitsandbytes, "gguf": by_gguf
}  # fmt: skip
