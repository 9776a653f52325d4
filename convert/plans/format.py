"""What a format is: the questions that plans, conversion and cards ask of it. formats.py answers them for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.source.checkpoint import Source
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme

Names = Mapping[str, tuple[str | None, tuple[int, ...]]]
"""Name in the artifact -> canonical name, None for what dgq generates, and shape; in the artifact's order."""


class Format(ABC):
    """One format. Objects have no state; the attributes below are facts of the class."""

    name: ClassVar[str]  # after --to, and a recipe's `format`
    variant: ClassVar[Literal["dgq"] | None] = None  # a recipe's `layout`
    default_recipe: ClassVar[str]  # of --to without --recipe
    title: ClassVar[str]  # for errors
    schemes: ClassVar[frozenset[str]]  # that it stores
    plain: ClassVar[str]  # the scheme of norms, scalars and the router
    router: ClassVar[str]  # a shell pattern on the names of the router's weights
    hub_library: ClassVar[str]  # what the Hub calls the program that opens it
    hub_tags: ClassVar[tuple[str, ...]]
    limit: ClassVar[str]  # what a card says first of its limits
    opens_in: ClassVar[str | None] = None  # where it opens, if that is one program
    ram_element: ClassVar[int]  # bytes of memory for each element of a slice at work; measured
    one_file: ClassVar[bool] = False  # all text weights lie in one file, and the vision tower in a file of its own
    takes_imatrix: ClassVar[bool] = False
    has_input_scales: ClassVar[bool] = False  # there is a place for a recipe's `activations` (W4A4)
    in_mix: ClassVar[bool] = True  # `dgq mix` makes recipes for it: it lets one choose

    @property
    def ladder(self) -> tuple[str, ...]:
        """The schemes that `dgq mix` tries, from few bits to many."""
        tried = [scheme for scheme in SCHEMES.values() if scheme.name in self.schemes and scheme.in_mix]
        return tuple(scheme.name for scheme in sorted(tried, key=lambda scheme: scheme.bits))

    def refusal(self, named: Collection[str]) -> str | None:
        """What is wrong with a recipe that names these schemes, all of which the format stores."""
        return None

    def file_type(self, scheme: Scheme) -> int:
        """general.file_type of an artifact that is mostly in this scheme; 0 where there is no such key."""
        return 0

    def artifact_name(self, canonical: str) -> str:
        """The name of a canonical tensor in the artifact."""
        return canonical

    def file_names(self, name: str, label: str, tower: bool) -> tuple[str, ...]:
        """The .gguf files of an artifact; () for a directory of safetensors. tower: there is a vision tower."""
        return ()

    def notices(self, source: Source) -> list[str]:
        """What the user should know of this source in this format."""
        return []

    def check(self, recipe: str, tensors: Collection[PlannedTensor]) -> None:
        """InputError, naming the recipe, for a plan that would open nowhere."""
        return None

    @abstractmethod
    def names(self, source: Source) -> Names:
        """The tensors that a recipe decides on."""

    @abstractmethod
    def planned(
        self, recipe: str, source: Source, schemes: Mapping[str, Scheme], activations: bool
    ) -> tuple[PlannedTensor, ...]:
        """The artifact's tensors in order. schemes: of all names(). InputError, naming the recipe, for what it cannot
        hold."""

    @abstractmethod
    def reader(self, path: Path) -> Callable[[str], Tensor]:
        """The stored tensors of an artifact by name, as they lie on disk."""
