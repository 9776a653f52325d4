"""transformers opens dgq's safetensors artifacts, after one line:

    import dgq.runtime.hf
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(directory, dtype=torch.bfloat16)

    bitsandbytes, 4 bit      its quantizer, put aside for DiffusionGemma's packed experts; other models keep it
    modelopt, NVFP4          a quantizer of our own: transformers has none

    before loading     the directory's weights are checked by dgq's reader; the modules of packed ones lose their
                       parameters, so that transformers loads the rest and finds nothing missing
    after loading      packed weights are put into both stacks, on the device of their layer
    save_pretrained    writes their tensors again, to the bit

Tried with transformers 5.23, on a CPU. Products decode a piece and forget it: small, and slower than dgq's own runtime.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_index, read_json
from dgq.quant.formats.bnb import STATE
from dgq.runtime.files.artifact import open_weights
from dgq.runtime.files.weights import DirWeights
from dgq.runtime.hf.modules import Holder, NoTower, Origin, PackedExperts, PackedLinear
from dgq.runtime.shape.names import DECODER, ENCODER

_FOR = "DiffusionGemmaForBlockDiffusion"


class ModeloptConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """config.json's quantization_config, kept as it is."""

    def __init__(self, quant_method: str = "modelopt", **settings: Any) -> None:
        self.quant_method = quant_method
        self._settings = settings

    def to_dict(self) -> dict[str, Any]:
        return {**self._settings, "quant_method": self.quant_method}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class _Packed(HfQuantizer):  # type: ignore[misc]
    """What both quantizers do with a directory of packed weights."""

    _weights: DirWeights | None = None

    def update_device_map(self, device_map: Any) -> Any:
        """ "auto" is one GPU, or the CPU: what is packed is put in after transformers has counted bytes."""
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def _begin(self, model: nn.Module, checkpoint_files: list[str] | None) -> None:
        """Check the directory, put empty modules in the places of packed weights."""
        if type(model).__name__ != _FOR or not checkpoint_files:
            raise InputError(f"{type(model).__name__} from packed weights; dgq opens {_FOR}.from_pretrained(directory)")
        path = Path(checkpoint_files[0]).parent
        _, _, weights = open_weights(path, read_json(path / "config.json"))
        if weights.is_mixed:
            raise InputError(
                f"{path}: FP8 or mixed precision, which `import dgq.runtime.hf` does not open; dgq run does"
            )
        self._weights, patterns = weights, set()
        if not weights.sees:  # transformers would make up a tower, and save it
            inner: Any = model.get_submodule("model.encoder")
            inner.vision_tower, inner.embed_vision = NoTower(str(path)), None
            model.config.vision_config = None  # type: ignore[union-attr]
        with torch.device("meta"):
            for name in weights.packed:
                module = name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]
                patterns.add(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape("." + module.removeprefix(DECODER) + ".")))
                shape = weights.shapes[name]
                for stack in _stacks(module):
                    new = PackedExperts() if len(shape) == 3 else PackedLinear(*shape)
                    model.set_submodule(stack, new)
        _untie(model, weights)
        known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = known | patterns  # type: ignore[assignment]

    def _finish(self, model: nn.Module) -> None:
        """Put the weights in. InputError for values no quantiser writes, or a layer that is offloaded."""
        weights, self._weights = self._weights, None
        assert weights is not None
        done = set()
        for name in weights.packed:
            owner, _, last = name.rpartition(".")
            if last == "weight":
                _fill(model, owner, {"held": name}, weights)
            elif owner not in done:
                done.add(owner)
                _fill(model, owner, {"gate_up": owner + ".gate_up_proj", "down": owner + ".down_proj"}, weights)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class ModeloptQuantizer(_Packed):
    """NVFP4 in modelopt's layout."""

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._begin(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._finish(model)
        return model


class BitsAndBytesQuantizer(_Packed, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """bitsandbytes' 4 bit: DiffusionGemma with packed experts here, everything else by transformers' own quantizer."""

    _ours = False
    _lacking: Exception | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """What transformers' quantizer needs (bitsandbytes, accelerate, a device it knows) is no need of ours."""
        try:
            Bnb4BitHfQuantizer.validate_environment(self, *args, **kwargs)
        except (ImportError, RuntimeError) as error:
            self._lacking = error

    def update_device_map(self, device_map: Any) -> Any:
        """None is the GPU, as for every model in bitsandbytes' format."""
        return Bnb4BitHfQuantizer.update_device_map(self, _Packed.update_device_map(self, device_map))

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._ours = self.pre_quantized and type(model).__name__ == _FOR and _has_packed_experts(checkpoint_files)
        if self._ours:
            self.serialized_names: dict[str, list[str]] = {}
            self._begin(model, checkpoint_files)
        elif self._lacking is not None:
            raise self._lacking
        else:
            Bnb4BitHfQuantizer._process_model_before_weight_loading(
                self, model, checkpoint_files=checkpoint_files, **kwargs
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._ours:
            self._finish(model)
        return Bnb4BitHfQuantizer._process_model_after_weight_loading(self, model, **kwargs)  # type: ignore[no-any-return]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return not self._ours and Bnb4BitHfQuantizer.param_needs_quantization(self, model, param_name, **kwargs)

    def get_weight_conversions(self) -> list[Any]:
        return [] if self._ours else Bnb4BitHfQuantizer.get_weight_conversions(self)

    @property
    def is_trainable(self) -> bool:
        return not self._ours

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> Any:
        if self._ours:
            raise NotImplementedError("dequantize() of dgq's packed weights; dgq.runtime reads and decodes them")
        return Bnb4BitHfQuantizer._dequantize(self, model, dtype)


def _has_packed_experts(checkpoint_files: list[str] | None) -> bool:
    if not checkpoint_files:
        return False
    names = read_index(Path(checkpoint_files[0]).parent)
    return any(name.endswith(STATE) and ".experts." in name for name in names)


def _stacks(module: str) -> list[str]:
    """A decoder's module, and the encoder's that it is tied to; self-conditioning has none."""
    layer = module.startswith(DECODER + "layers.")
    return [module, ENCODER + module.removeprefix(DECODER)] if layer else [module]


def _untie(model: nn.Module, weights: DirWeights) -> None:
    """transformers ties the stacks' parameters by patterns, of which those for experts find nothing where these are
    packed; layers whose experts are not are named one by one."""
    routed = {"gate_up_proj", "down_proj"}
    packed = {name.rpartition(".")[0] for name in weights.packed}
    inner: Any = model.get_submodule("model")
    tied = {k: v for k, v in inner._tied_weights_keys.items() if k.rpartition("*")[2] not in routed}
    for name in weights:
        owner, _, last = name.rpartition(".")
        if last in routed and owner not in packed:
            tied[ENCODER.removeprefix("model.") + name.removeprefix(DECODER)] = name.removeprefix("model.")
    inner._tied_weights_keys = tied
    whole: Any = model
    whole.all_tied_weights_keys = whole.get_expanded_tied_weights_keys(all_submodels=True)


def _fill(model: nn.Module, owner: str, names: dict[str, str], weights: DirWeights) -> None:
    """names: attribute of the modules -> canonical name."""
    stacks = [model.get_submodule(stack) for stack in _stacks(owner)]
    device = _device(model, owner)
    for attribute, name in names.items():
        held = Holder(Origin(*weights.origin(name)), weights[name], saves=True).to(device)
        for number, module in enumerate(stacks):
            setattr(module, attribute, held if not number else held.shared())


def _device(model: nn.Module, owner: str) -> torch.device:
    """That of the layer's, or self-conditioning's, first parameter."""
    layer = re.match(re.escape(DECODER) + r"(layers\.\d+|self_conditioning)", owner)
    assert layer is not None
    module = model.get_submodule(layer[0])
    device: torch.device = next(p for n, p in module.named_parameters() if "part_" not in n).device
    if device.type == "meta":
        raise InputError(f"{layer[0]} is offloaded; packed weights stay on a device, dgq run --vram offloads experts")
    return device


def _register() -> None:
    register_quantization_config("modelopt")(ModeloptConfig)
    register_quantizer("modelopt")(ModeloptQuantizer)
    AUTO_QUANTIZER_MAPPING.pop("bitsandbytes_4bit", None)
    register_quantizer("bitsandbytes_4bit")(BitsAndBytesQuantizer)


_register()
