"""An artifact's weights under their canonical names, whatever its files call them. They are checked when the artifact
is opened and read when they are used.

    GGUFWeights   blk.7.attn_output.weight                      one tensor a weight; gguf_weights.py has it
    DirWeights    model.decoder.layers.7.self_attn.o_proj.weight   one tensor, or those of the directory's layout

Both map a canonical name to a Packed and know each weight's scheme and bytes without reading it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import FLOATS, HFDir
from dgq.quant.formats.bnb import LONGEST_STATE, STATE, STATES, BitsAndBytes
from dgq.quant.formats.bnb_experts import ExpertsApart
from dgq.quant.formats.fp8_groups import Mixed
from dgq.quant.formats.modelopt import Modelopt
from dgq.quant.formats.own_layout import OwnLayout
from dgq.quant.schemes.fp8 import FP8
from dgq.quant.schemes.nf4 import BLOCK
from dgq.quant.types import Entry, Layout, Packed, Spec
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import check_tensors, expected_tensors

MIB = 1 << 20


@dataclass(frozen=True)
class Stored:
    """A weight as its file holds it: the scheme's name, elements, bytes, and how many tensors."""

    scheme: str
    numel: int
    nbytes: int
    tensors: int = 1


class Weights(Mapping[str, Packed]):
    """The text weights, canonical name -> Packed, and what is known of every weight before it is read."""

    @abstractmethod
    def everything(self) -> dict[str, Stored]:
        """Every weight in the files by its canonical name, those of the vision part included."""

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The files that hold them."""

    @property
    def sees(self) -> bool:
        """Whether the files hold a vision tower, as far as that is known before an image is given."""
        return True

    @property
    def only_dgq(self) -> bool:
        """Whether no other program has a loader for their layout."""
        return False

    @property
    def without_import(self) -> str | None:
        """What transformers does with the artifact without `import dgq.runtime.hf`; None if the import changes
        nothing."""
        return None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines for whoever runs the artifact, such as weights that take more memory than disk."""
        return ()

    def own_name(self, name: str) -> str:
        """The name that the file has for a weight."""
        return name

    def vision_tensor(self, name: str) -> Tensor:
        """A tensor of the vision part by its canonical name, in any float dtype. KeyError if there is none."""
        raise KeyError(name)


class DirWeights(Weights):
    """A safetensors directory's text weights. layout: how the quantised ones are stored; None if there are none."""

    def __init__(
        self,
        directory: HFDir,
        config: ModelConfig,
        layout: Layout | None,
        vision: Mapping[str, tuple[int, ...]],
        remarks: Sequence[str] = (),
    ) -> None:
        """InputError naming file and tensor: missing, unknown, mis-shaped, or of another dtype than the layout's.

        vision: the tensors of the vision part, which must be there too. remarks: what was odd about the directory.
        """
        self._odd = tuple(remarks)
        self._dir, self._layout, self._vision = directory, layout, dict(vision)
        self.shapes = expected_tensors(config)
        specs = directory.specs
        self._quantised: dict[str, dict[str, Entry]] = {}
        self._tower = _packed_tower(layout, vision, directory.specs)
        held = sum(spec.stop - spec.start for spec in specs.values())
        expected = {name: shape for name, shape in vision.items() if name not in self._tower}
        expected |= {entry: size for entries in self._tower.values() for entry, (_, size) in entries.items()}
        for name, shape in self.shapes.items():
            plain = name in specs and specs[name].dtype in FLOATS
            if layout is None or plain or not layout.holds(name, shape):
                expected[name] = shape
            else:
                _check_room(layout, name, shape, held, directory.path)
                self._quantised[name] = layout.entries(name, shape)
                expected |= {entry: size for entry, (_, size) in self._quantised[name].items()}
        if layout is not None and not (self._quantised or self._tower):
            wrong = f"{directory.path}: said to be {layout.slices.name}, but every weight is plain"
            raise InputError(f"{wrong}; fetch it again, or delete what its config says of quantisation")
        # A quant_state is a JSON text, whose length depends on who wrote it.
        states = {name: specs[name].shape for name in expected if STATES in name and name in specs}
        expected |= {name: shape for name, shape in states.items() if len(shape) == 1 and shape[0] <= LONGEST_STATE}
        shapes = {name: spec.shape for name, spec in specs.items()}
        check_tensors(shapes, expected, str(directory.path), file=lambda name: str(directory.file(name)))
        packed = (*self._quantised.values(), *self._tower.values())
        dtypes = {entry: {kind} for entries in packed for entry, (kind, _) in entries.items()}
        for name in expected:
            allowed = dtypes.get(name, set(FLOATS))
            if specs[name].dtype not in allowed:
                wrong = f"{name} has dtype {specs[name].dtype}, expected {' or '.join(sorted(allowed))}"
                raise InputError(f"{directory.file(name)}: {wrong}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Packed:
        if self._layout is not None and name in self._quantised:
            return self._layout.join(name, self.shapes[name], self._dir)
        return self._dir[name]

    @property
    def sees(self) -> bool:
        return bool(self._vision)

    @property
    def is_mixed(self) -> bool:
        """Whether modules are stored in several ways, FP8 among them or not."""
        return isinstance(self._layout, Mixed)

    @property
    def is_modelopts(self) -> bool:
        """Whether it is modelopt's layout, with or without FP8."""
        return isinstance(self._layout.base if isinstance(self._layout, Mixed) else self._layout, Modelopt)

    @property
    def packed(self) -> tuple[str, ...]:
        """Canonical names of the weights that are stored quantised."""
        return tuple(self._quantised)

    def origin(self, name: str) -> tuple[Layout | None, str, tuple[int, ...], torch.Tensor | None]:
        """A weight's layout, None if it is plain; name; shape; and bitsandbytes' quant_state as it lies on disk."""
        layout = self._layout if name in self._quantised else None
        state = self._dir.tensor(name + STATE).clone() if name + STATE in self._dir.specs else None
        return layout, name, self.shapes[name], state

    def everything(self) -> dict[str, Stored]:
        return {name: self._stored(name) for name in (*self.shapes, *self._vision)}

    @property
    def only_dgq(self) -> bool:
        return isinstance(self._layout, OwnLayout)

    @property
    def without_import(self) -> str | None:
        if not any(".experts." in name for name in self._quantised):
            return None
        if isinstance(self._layout, BitsAndBytes):
            return "raises"
        random = isinstance(self._layout, (Modelopt, ExpertsApart))
        return "gives the experts RANDOM weights and only warns" if random else None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is decoded when it is loaded (FP8, or double quantisation's absmax), and the memory that it costs."""
        if isinstance(self._layout, Mixed):
            eights = [self._stored(name) for name in self._quantised if self._layout.scheme_of(name) is FP8]
            numel = sum(one.numel for one in eights)
            what = f"{len(eights)} weights are FP8, which dgq has no kernels for: on a GPU they are decoded to BF16"
            memory = f"{2 * numel / MIB:,.1f} MiB of memory instead of {numel / MIB:,.1f}"
            return (*self._odd, *([f"{self._dir.path.name}: {what} when loaded, {memory}"] if eights else []))
        if not isinstance(self._layout, ExpertsApart) or not self._layout.base.double:
            return self._odd
        experts = sum(math.prod(self.shapes[name]) for name in self._quantised if len(self.shapes[name]) == 3)
        more = 3 * experts / BLOCK / MIB  # a byte becomes four
        what = f"absmax quantised an expert at a time become float32 when loaded, {more:,.1f} MiB more"
        return (*self._odd, f"{self._dir.path.name}: {what}")

    def vision_tensor(self, name: str) -> Tensor:
        if name in self._tower:
            bnb = _bitsandbytes(self._layout)
            assert bnb is not None
            return bnb.decoded(name, self._vision[name], self._dir)
        return self._dir.tensor(name)

    def _stored(self, name: str) -> Stored:
        entries = self._quantised.get(name) or self._tower.get(name)
        specs = [self._dir.specs[entry] for entry in entries or (name,)]
        nbytes = sum(spec.stop - spec.start for spec in specs)
        if entries and self._layout:
            shape = self.shapes.get(name) or self._vision[name]
            return Stored(self._layout.scheme_of(name).name, math.prod(shape), nbytes, len(specs))
        return Stored(FLOATS[specs[0].dtype], specs[0].numel, nbytes)

    @property
    def files(self) -> list[Path]:
        return sorted({place.file for spec in self._dir.specs.values() for place in spec.places})


def _bitsandbytes(layout: Layout | None) -> BitsAndBytes | None:
    base = layout.base if isinstance(layout, ExpertsApart) else layout
    return base if isinstance(base, BitsAndBytes) else None


def _packed_tower(
    layout: Layout | None, vision: Mapping[str, tuple[int, ...]], specs: Mapping[str, Spec]
) -> dict[str, dict[str, Entry]]:
    """The tensors of those vision weights that bitsandbytes packed, as transformers' load_in_4bit does unless it is
    told to leave the tower out. No other layout packs them."""
    bnb = _bitsandbytes(layout)
    if bnb is None:
        return {}
    packed = [name for name in vision if name in specs and specs[name].dtype not in FLOATS]
    return {name: bnb.entries(name, vision[name]) for name in packed if bnb.holds(name, vision[name])}


def _check_room(layout: Layout, name: str, shape: tuple[int, ...], held: int, path: Path) -> None:
    """Refuse a quantised weight that cannot be in the files, before the names of its tensors are listed: a damaged
    config may ask for four tensors for each of millions of experts. held: bytes of the files' tensors."""
    scheme = layout.scheme_of(name)
    if shape[-1] % scheme.block:
        what = f"rows of {shape[-1]} in {name} are no multiple of {scheme.name}'s block of {scheme.block}"
        raise InputError(f"{path}: {what}; dgq opens no others")
    if (size := scheme.nbytes(shape)) > held:
        what = f"{name} {list(shape)}, as the config has it, takes {size} bytes as {scheme.name}"
        raise InputError(f"{path}: {what}, but the files hold {held}")
