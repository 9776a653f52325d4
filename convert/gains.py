"""What the model's own norms say of a weight's columns: effort fast's importance for GGUF, without any data.

    residual -> x / rms(x) * gain -> weight       column i of the weight multiplies what was scaled by gain_i

E[x_i²] would be gain_i² if the residual's channels were alike; they are not, and |gain| does better on `tiny`. Weights
that no norm feeds are ggml's as ever. NVFP4 and NF4 gain nothing by it, and keep to the squared error.
"""

from __future__ import annotations

from torch import Tensor

from dgq.convert.source import Source
from dgq.runtime.names import DECODER

FLOOR = 2.0**-8  # of the largest gain: no column weighs nothing
_NORM_OF = {
    "self_attn.q_proj.weight": "input_layernorm.weight",
    "self_attn.k_proj.weight": "input_layernorm.weight",
    "self_attn.v_proj.weight": "input_layernorm.weight",
    "mlp.gate_proj.weight": "pre_feedforward_layernorm.weight",
    "mlp.up_proj.weight": "pre_feedforward_layernorm.weight",
    "experts.gate_up_proj": "pre_feedforward_layernorm_2.weight",
    "self_conditioning.gate_proj.weight": "self_conditioning.pre_norm.weight",
    "self_conditioning.up_proj.weight": "self_conditioning.pre_norm.weight",
}


def importance(source: Source, name: str) -> Tensor | None:
    """float32 (in,), the largest 1; None for a weight without a norm before it, or whose norm says nothing."""
    for suffix, norm in _NORM_OF.items():
        if name.startswith(DECODER) and name.endswith("." + suffix):
            of = name.removesuffix(suffix) + norm
            gain = source.rows(of, 0, source.text[of].shape[0]).float().abs()
            largest = gain.amax()
            # what is no number is refused where the norm itself is converted
            return (gain / largest).clamp(min=FLOOR) if 0 < float(largest) < float("inf") else None
    return None
