"""nvidia-modelopt's own NVFP4, in a process of its own (it patches what it imports). Of what it does, one a line:

    export SRC OUT nvfp4|nvfp4-w4a16|nvfp4-all|mixed|fp8      quantise IN OUT      round X Y

`export` writes the checkpoint SRC to OUT as modelopt's DiffusionGemma recipe does (weight-only: without its input and
KV cache quantisers; all: and with a weight quantiser in every Linear of the text model but the router; mixed: and with
FP8, one scale a matrix in attention and one a row in the dense MLP; fp8: FP8 alone, in the experts too; these two
also write OUT/decoded, the weights as modelopt decodes them). `quantise` gives each tensor of the safetensors file IN
to NVFP4QTensor, and `round` x of X, a file of {"x", "input_scale"}.

    modelopt = Oracle(); modelopt("export", src, out, "nvfp4"); modelopt.end()

imports modelopt once, which takes as long as many an export, and works in a fork of that process each time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def export(src: str, out: str, recipe: str) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.recipe import load_recipe
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(src, dtype=torch.bfloat16)
    config: dict[str, Any] = load_recipe("huggingface/diffusion_gemma/ptq/nvfp4_experts_only").quantize.model_dump()
    if recipe not in ("nvfp4", "mixed"):
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

    if recipe in ("mixed", "fp8"):
        eight = {"num_bits": (4, 3), "axis": None}
        rows = {"num_bits": (4, 3), "axis": 0}
        tokens = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}
        rules = [
            {"quantizer_name": f"*{stack}.layers.*.{part}.*{kind}_quantizer", "cfg": cfg, "enable": True}
            for stack in ("decoder", "language_model")
            for part, weights, inputs in (("self_attn", eight, eight), ("mlp", rows, tokens))
            for kind, cfg in (("proj.weight", weights), ("proj.input", inputs))
        ]
        if recipe == "fp8":
            config["quant_cfg"] = [r for r in config["quant_cfg"] if r.get("enable") is False]
            rules.append({"quantizer_name": "*.experts.*weight_quantizer", "cfg": eight, "enable": True})
        config["quant_cfg"] += rules

    def calibrate(model: Any) -> None:
        torch.manual_seed(0)
        model.generate(torch.randint(5, 500, (1, 8)), max_new_tokens=1, max_denoising_steps=1, disable_compile=True)

    mtq.quantize(model, config, calibrate if recipe in ("nvfp4", "mixed", "fp8") else None)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)


def decode(out: str) -> None:
    """OUT/decoded, safetensors: the exported modules' weights in float32, by modelopt's tensors."""
    import torch
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
    from safetensors.torch import load_file, save_file

    tensors, decoded = load_file(f"{out}/model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(".weight") and n + "_scale" in tensors]:
        weight, scale = tensors[name], tensors[name + "_scale"]
        if weight.dtype == torch.uint8:
            shape, more = (weight.shape[0], 2 * weight.shape[1]), {"double_scale": tensors[name + "_scale_2"]}
            packed = NVFP4QTensor(torch.Size(shape), torch.float32, weight)
            decoded[name] = packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 16}, **more)
        else:
            eight = FP8QTensor(weight.shape, torch.float32, weight)
            decoded[name] = eight.dequantize(torch.float32, scale=scale if scale.dim() == 0 else scale[:, None])
    save_file({name: weight.contiguous() for name, weight in decoded.items()}, f"{out}/decoded")


def round_to_nvfp4(source: str, target: str) -> None:
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from safetensors.torch import load_file, save_file

    given = load_file(source)
    packed, scale, scale_2 = NVFP4QTensor.quantize(given["x"], 16, None, given["input_scale"])
    blocks = {-1: 16}
    rounded = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes=blocks)
    save_file({"rounded": rounded.contiguous()}, target)


def quantise(source: str, target: str) -> None:
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from safetensors.torch import load_file, save_file

    made = {}
    for name, weight in load_file(source).items():
        packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
        made |= {name: packed._quantized_data, name + " scale": scale.view(torch.uint8), name + " scale_2": scale_2}
    save_file(made, target)


def work(what: str, *arguments: str) -> None:
    {"export": export, "quantise": quantise, "round": round_to_nvfp4}[what](*arguments)
    if arguments[2:] in (("mixed",), ("fp8",)):
        decode(arguments[1])


def serve() -> None:
    """A JSON list a line from standard input, work in a fork, its exit code as a line to standard output."""
    import modelopt.torch.export
    import modelopt.torch.quantization  # noqa: F401
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion  # noqa: F401

    torch.compiler.cudagraph_mark_step_begin = lambda: None  # for which generate() imports torch's compiler
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        if not (child := os.fork()):
            code = 1
            try:
                work(*json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


class Oracle:
    """The process, started when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end()

    def __call__(self, *words: object) -> None:
        """One line of work, done."""
        if self._process is None:
            command, pipe = [sys.executable, str(Path(__file__).resolve())], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        assert self._process.stdin and self._process.stdout
        print(json.dumps([str(word) for word in words]), file=self._process.stdin, flush=True)
        code = self._process.stdout.readline().strip()
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 3000))
        assert code == "0", f"modelopt: {words} ended with {code or 'nothing'}: {self._errors.read()}"

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate()
        self._errors.close()


if __name__ == "__main__":
    serve()
