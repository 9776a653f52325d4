"""Names a folder that holds something else than a model's weights, and says what to do with it.

adapter_config.json, adapter_model.safetensors    a LoRA adapter
global_step500/, zero_to_fp32.py                  a ZeRO checkpoint of DeepSpeed
*.distcp                                          a sharded checkpoint of FSDP
checkpoint-500/model.safetensors                  the model lies one folder below
pytorch_model*.bin, *.pt, *.onnx, tf_model.h5     another container
"""

from __future__ import annotations

from pathlib import Path

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import INDEX, SINGLE

# Patterns of file names -> what a folder with such files holds, and what to do. The first that fits is taken.
KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("adapter_config.json",), "holds a LoRA adapter and no model; give its base model, with --adapter {path}"),
    ((f"*/{SINGLE}", f"*/{INDEX}"), "holds no weights itself; name the folder below it that does, {first}"),
    (
        ("zero_to_fp32.py", "global_step*", "*zero_pp_rank*"),
        "holds DeepSpeed's ZeRO shards; merge them: python zero_to_fp32.py {path} OUT --safe_serialization",
    ),
    (("*.distcp", "*/*.distcp"), "holds FSDP's shards; merge them: accelerate merge-weights {path} OUT"),
    (("openvino_model.xml",), "is an OpenVINO export; take the safetensors checkpoint that it was made from"),
    (
        ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt"),
        "holds pickled weights ({first}), which dgq does not open; save them as safetensors with transformers:"
        " from_pretrained(…).save_pretrained(OUT)",
    ),
    (("*.onnx", "onnx/*.onnx"), "is an ONNX export ({first}); take the safetensors checkpoint that it was made from"),
    (
        ("tf_model*.h5", "saved_model.pb", "*.tflite", "flax_model*.msgpack"),
        "is a TensorFlow or Flax export ({first}); take the safetensors checkpoint that it was made from",
    ),
    (("weights*.npz",), "is an MLX export ({first}); take the safetensors checkpoint that it was made from"),
    (("model-*-of-*.safetensors",), "holds shards ({first}) without {index}; fetch that file too"),
    (("model.*.safetensors",), "holds {first}, a variant, and no model.safetensors; rename it so"),
    (("consolidated*.safetensors",), "holds {first} alone, another layout; take the checkpoint with model.safetensors"),
)  # fmt: skip


def refuse_other(path: Path) -> None:
    """InputError for a folder without a model's safetensors and without a .gguf, if it is one of KINDS."""
    if (path / SINGLE).exists() or (path / INDEX).exists() or any(path.glob("*.gguf")):
        return
    for patterns, text in KINDS:
        first = next((file for pattern in patterns for file in sorted(path.glob(pattern))), None)
        if first is not None:
            below = first.parent.name + "/" if first.parent != path else first.name
            raise InputError(f"{path}: {text.format(path=path, first=below, index=INDEX)}")
