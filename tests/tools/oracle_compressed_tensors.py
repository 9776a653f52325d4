"""`tiny` exported by compressed-tensors itself, in llm-compressor's steps. llm-compressor is no dependency, as it pins
other versions of both libraries; names, bytes and quantization_config of its own export are these (0.14.0.1, by
memoryless_minmax; its config also names that observer, its input scales are of its calibration).

    DiffusionGemmaForBlockDiffusion, experts apart in Linear modules -> apply_quantization_config -> scales from weights
    -> ModelCompressor.compress_model -> save_pretrained -> ModelCompressor.update_config

So the libraries choose names, packing, dtypes, what is saved for the encoder, and what config.json says.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, is_module_quantized
from torch import Tensor, nn
from transformers import DiffusionGemmaForBlockDiffusion

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
IGNORED = ["lm_head", *(f"re:.*{part}.*" for part in ("embed_vision", "vision_tower", "router", "self_conditioning"))]
FUSED = (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))  # share their global scale
DECODERS, ENCODERS = 250.0, 300.0  # input scales: each stack sees activations of its own


def export(path: Path, schemes: Sequence[QuantizationScheme], shard: str = "1GB") -> dict[str, Tensor]:
    """Writes the directory. Returns module + ".weight" -> the weight as the package decodes it, in float32."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(TINY, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            model.set_submodule(name, apart(module))
    groups = {f"group_{number}": scheme for number, scheme in enumerate(schemes)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=IGNORED), show_progress=False)
    quantised = {name: module for name, module in model.named_modules() if is_module_quantized(module)}
    for name, module in quantised.items():
        calibrate(module, model.get_submodule(name.rpartition(".")[0]), name)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path, max_shard_size=shard)
    compressor.update_config(str(path))
    for file in (*TINY.glob("*token*"), TINY / "chat_template.jinja"):
        shutil.copyfile(file, path / file.name)
    decoded = {f"{name}.weight": decode(module) for name, module in quantised.items() if ".decoder." in name}
    compressor.decompress_model(model)
    for name, weight in decoded.items():  # theirs is in bfloat16, on the way too
        torch.testing.assert_close(model.get_parameter(name).float(), weight, atol=0, rtol=2**-6)
    return decoded


def apart(experts: Any) -> nn.ModuleList:
    def linear(weight: Tensor) -> nn.Linear:
        made = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        return made

    apart = nn.ModuleList()
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = gate_up.chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        apart.append(nn.ModuleDict({part: linear(weight) for part, weight in parts.items()}))
    return apart


@torch.no_grad()
def calibrate(module: Any, owner: nn.Module, name: str) -> None:
    """What llm-compressor's memoryless_minmax observers and their fusion set, in the weights' bfloat16."""
    args, whole = module.quantization_scheme.weights, None
    pieces = {
        "tensor_group": lambda weight: weight.unflatten(-1, (-1, 16)),
        "channel": lambda weight: weight.unsqueeze(-2),
        "tensor": lambda weight: weight.reshape(1, -1),
    }[args.strategy](module.weight)
    if args.strategy == "tensor_group":
        last = name.rpartition(".")[2]
        together = next((group for group in FUSED if last in group), (last,))
        peers = [peer.weight for part in together if (peer := getattr(owner, part, None)) is not None]
        amax = torch.stack([peer.abs().max() for peer in peers]).max().reshape(1)
        whole = generate_gparam(-amax, amax)
        module.weight_global_scale.copy_(whole)
    module.weight_scale.copy_(calculate_qparams(pieces.amin(-1), pieces.amax(-1), args, global_scale=whole)[0])
    for scale in ("input_global_scale", "input_scale"):
        if hasattr(module, scale):
            getattr(module, scale).fill_(DECODERS if ".decoder." in name else ENCODERS)


def decode(module: Any) -> Tensor:
    """By the package's steps, each in float32."""
    args, scale = module.quantization_scheme.weights, module.weight_scale.float()
    if not hasattr(module, "weight_packed"):
        return dequantize(x_q=module.weight, scale=scale, args=args, dtype=torch.float32)
    rows, half = module.weight_packed.shape
    codes = unpack_fp4_from_uint8(module.weight_packed, rows, 2 * half, dtype=torch.float32)
    return dequantize(x_q=codes, scale=scale, args=args, global_scale=module.weight_global_scale, dtype=torch.float32)
