"""nvidia-modelopt's own NVFP4, in a process of its own (it patches what it imports):

    python oracle_modelopt.py SRC OUT nvfp4|nvfp4-w4a16|nvfp4-all [X Y]

exports the checkpoint SRC to OUT as modelopt's DiffusionGemma recipe does (weight-only: without its input and KV cache
quantisers; all: and with a weight quantiser in every Linear of the text model but the router). With X, a safetensors
file of {"x", "input_scale"}, x rounded to NVFP4 by NVFP4QTensor goes to Y.
"""

from __future__ import annotations

import sys
from typing import Any


def export(src: str, out: str, recipe: str) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.recipe import load_recipe
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(src, dtype=torch.bfloat16)
    config: dict[str, Any] = load_recipe("huggingface/diffusion_gemma/ptq/nvfp4_experts_only").quantize.model_dump()
    if recipe != "nvfp4":
        config["quant_cfg"] = [
            rule
            for rule in config["quant_cfg"]
            if rule.get("enable") is False
            or not ("input_q" in rule["quantizer_name"] or "bmm" in rule["quantizer_name"])
        ]

    if recipe == "nvfp4-all":
        (experts,) = (rule for rule in config["quant_cfg"] if rule["quantizer_name"] == "*.experts.*weight_quantizer")
        off = [rule for rule in config["quant_cfg"] if rule.get("enable") is False]
        off = [rule for rule in off if rule["quantizer_name"] != "*self_conditioning*"]
        config["quant_cfg"] = [off[0], experts | {"quantizer_name": "*weight_quantizer"}, *off[1:]]

    def calibrate(model: Any) -> None:
        torch.manual_seed(0)
        model.generate(torch.randint(5, 500, (1, 8)), max_new_tokens=1, max_denoising_steps=1, disable_compile=True)

    mtq.quantize(model, config, calibrate if recipe == "nvfp4" else None)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)


def round_to_nvfp4(source: str, target: str) -> None:
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from safetensors.torch import load_file, save_file

    given = load_file(source)
    packed, scale, scale_2 = NVFP4QTensor.quantize(given["x"], 16, None, given["input_scale"])
    blocks = {-1: 16}
    rounded = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes=blocks)
    save_file({"rounded": rounded.contiguous()}, target)


if __name__ == "__main__":
    export(*sys.argv[1:4])
    if len(sys.argv) > 4:
        round_to_nvfp4(*sys.argv[4:6])
