"""The vision tower of a .gguf: a file of its own beside the text model's, in llama.cpp's names for Gemma 4's tower.

    diffusiongemma-Q4_K_M.gguf, mmproj-diffusiongemma-BF16.gguf        one mmproj*.gguf in the same directory

    encoder.layers.7.self_attn.q_proj.linear.weight     v.blk.7.attn_q.weight         below model.encoder.vision_tower.
    encoder.layers.7.mlp.up_proj.input_min, ()          v.blk.7.ffn_up.input_min, (1,)
    patch_embedder.input_proj.weight, (h, p·p·3)        v.patch_embd.weight, (h, 3, p, p)    a convolution's kernel
    embed_vision.embedding_projection.weight            mm.input_projection.weight

Nothing else differs, and a reader takes what the metadata has no key for as Gemma 4 has it: RoPE's theta is 100, the
activation gelu's tanh form, head_dim the width over the heads. Any Gemma 4 tower's file of fitting widths opens.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.runtime.shape.fields import Fields
from dgq.runtime.shape.names import check_tensors
from dgq.runtime.shape.vision import EMBED, TOWER, expected_vision

ARCH, PROJECTOR = "clip", "gemma4v"
KEYS = "clip.vision."
THETA = 100.0
POOLING, SOFT_TOKENS = 3, 280  # where projector.scale_factor and image_max_pixels are not said

PATCHES = TOWER + "patch_embedder.input_proj.weight"
_OTHER = {
    PATCHES: "v.patch_embd.weight",
    TOWER + "patch_embedder.position_embedding_table": "v.position_embd.weight",
    TOWER + "std_bias": "v.std_bias",
    TOWER + "std_scale": "v.std_scale",
    EMBED + "embedding_projection.weight": "mm.input_projection.weight",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_IN_LAYER = re.compile(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.(\w+(?:\.\w+_(?:proj|norm))?)(?:\.linear)?\.(\w+)")


def mmproj_name(name: str) -> str:
    """The file's name of a canonical vision tensor."""
    if name in _OTHER:
        return _OTHER[name]
    match = _IN_LAYER.fullmatch(name)
    assert match is not None, name
    return f"v.blk.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a canonical vision tensor in the file."""
    if name == PATCHES:
        side = math.isqrt(shape[1] // 3)
        return shape[0], 3, side, side
    return shape or (1,)


def stored(name: str, values: Tensor) -> Tensor:
    """The file's arrangement of a tensor, or of some of its rows."""
    if name != PATCHES:
        return values if values.dim() else values.view(1)
    side = math.isqrt(values.shape[1] // 3)
    return values.view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()


def find_mmproj(folder: Path) -> list[Path]:
    """The mmproj files in a directory."""
    return sorted(file for file in folder.glob("*.gguf") if is_mmproj(file))


def is_mmproj(file: Path) -> bool:
    """By its name, as llama.cpp's tools tell them."""
    return "mmproj" in file.name.lower()


def only_mmproj(folder: Path, model: Path) -> Path:
    """The one beside `model`. InputError if there is none, or a choice."""
    files = find_mmproj(folder)
    if not files:
        raise InputError(
            f"{model}: has no vision tower, which images need: no mmproj*.gguf lies in {folder}; put it there, so named"
        )
    if len(files) > 1:
        raise InputError(f"{folder}: holds {len(files)} mmproj files ({files[0].name}, {files[1].name}, …); keep one")
    return files[0]


class Mmproj:
    """An opened mmproj file, checked from its header. config: as config.json's vision_config says it; shapes: of
    its tensors, by canonical name."""

    def __init__(self, path: Path, text_hidden: int) -> None:
        """InputError if it is no Gemma 4 vision tower, not for a text model of this width, or incomplete."""
        self.reader = reader = GGUFReader(path)
        top = Fields(reader.metadata, str(path))
        arch = top.get("general.architecture", str, "")
        if arch != ARCH:
            raise InputError(f"{path}: general.architecture is {arch!r}, a vision tower's is {ARCH!r}")
        kind = reader.metadata.get(KEYS + "projector_type") or reader.metadata.get("clip.projector_type")
        if kind != PROJECTOR:
            raise InputError(f"{path}: its projector_type is {kind!r}, DiffusionGemma's is {PROJECTOR!r}")
        fields = Fields(reader.metadata, str(path), prefix=KEYS)
        if (width := fields.count("projection_dim")) != text_hidden:
            raise InputError(
                f"{path}: is for a text model {width} wide, and this one is {text_hidden}: another model's"
            )
        self.config = self._config(fields)
        self.shapes = expected_vision({"vision_config": self.config}, text_hidden, str(path))
        stored_shapes = {mmproj_name(name): stored_shape(name, shape) for name, shape in self.shapes.items()}
        check_tensors({name: reader.shape(name) for name in reader}, stored_shapes, str(path))

    def _config(self, fields: Fields) -> dict[str, Any]:
        patch, pooling = fields.count("patch_size"), fields.count("projector.scale_factor", POOLING)
        pixels = fields.count("image_max_pixels", SOFT_TOKENS * (patch * pooling) ** 2)
        heads, hidden = fields.count("attention.head_count"), fields.count("embedding_length")
        table = _OTHER[TOWER + "patch_embedder.position_embedding_table"]
        if table not in self.reader:
            raise InputError(f"{self.reader.path}: tensor {table} is missing")
        return {
            "model_type": "gemma4_vision",
            "hidden_size": hidden,
            "intermediate_size": fields.count("feed_forward_length"),
            "num_hidden_layers": fields.count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": fields.positive("attention.layer_norm_epsilon"),
            "patch_size": patch,
            "pooling_kernel_size": pooling,
            "max_soft_tokens": pixels // (patch * pooling) ** 2,  # the image processor's, where no file says it
            "position_embedding_size": self.reader.shape(table)[-2],
            "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
            "standardize": _OTHER[TOWER + "std_bias"] in self.reader,
            "use_clipped_linears": any(name.endswith(".input_min") for name in self.reader),
        }

    def tensor(self, name: str) -> Tensor:
        """A canonical vision tensor, decoded to float32."""
        values = self.reader[mmproj_name(name)].dequantize()
        if name == PATCHES:
            values = values.permute(0, 2, 3, 1)
        return values.reshape(self.shapes[name])
