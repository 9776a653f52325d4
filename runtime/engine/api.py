"""The engine for programs: `dgq.runtime.load(path)`.

engine = dgq.runtime.load("diffusiongemma-NVFP4")
engine.generate("Once upon a time", max_new_tokens=512).text
for event in engine.stream([{"role": "user", "content": "Why is the sky blue?"}]):
    ...    # Step: the canvas taking shape; Block: tokens that stay
chat = engine.chat()
chat.ask("Why is the sky blue?").text
chat.ask("And at night?").text
engine.generate([{"role": "user", "content": "What is this?"}], images=["cat.png"]).text
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Self

import torch

from dgq.quant.errors import InputError
from dgq.runtime.adapters.adapter import open_adapter
from dgq.runtime.engine.chat import Chat
from dgq.runtime.engine.engine import Block, Request, Step, generate, stream
from dgq.runtime.files.artifact import Artifact, open_artifact
from dgq.runtime.files.images import Once, placed
from dgq.runtime.files.reply import Reply
from dgq.runtime.files.tool_calls import ToolCall
from dgq.runtime.shape.pictured import Pictured

if TYPE_CHECKING:
    from dgq.runtime.files.tower import Tower

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A raw text, token ids, or the messages of a chat, whose content may be parts: see images.placed()."""

Images = Sequence[Any]
"""The images of one prompt: paths of files, or PIL images."""


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt. ended: whether the model ended it by itself; steps: how many each block took.
    reasoning, tool_calls, unfinished_thought: of an answer to messages, whose text is without them, see
    files.reply.Reply; an answer to a raw text has all of it as its text."""

    text: str
    tokens: list[int]
    ended: bool
    steps: list[int]
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    unfinished_thought: bool = False


class Engine:
    """An opened artifact on a device.

    It computes one batch at a time: threads that call generate() wait for each other, and a stream or a chat belongs to
    one thread. The first image loads the vision tower, which then stays; on the CPU if `vram` bounds the GPU's memory.
    """

    def __init__(self, artifact: Artifact, device: str, dtype: torch.dtype | None, vram: int | None) -> None:
        self.artifact, self.tokenizer, self.generation = artifact, artifact.tokenizer, artifact.generation
        self.model = artifact.load(device, dtype, vram=vram)
        self._lock = RLock()
        self._tower_device = self.model.device if vram is None else torch.device("cpu")

    @cached_property
    def tower(self) -> Tower:
        """The vision tower, in the model's dtype. InputError if the artifact has none."""
        return self.artifact.vision.tower(self._tower_device, self.model.dtype)

    def ids(self, prompt: Prompt, images: Images = (), image_tokens: int | None = None) -> Sequence[int]:
        """A prompt's tokens, its images among them; the result is a prompt as well. image_tokens: the most that an
        image becomes: 70, 140, 280, 560 or 1120; None: the model's setting."""
        if isinstance(prompt, Pictured) and not images:
            return prompt
        ids, images, front = placed(self.tokenizer, prompt, images)
        return self.artifact.vision.with_tokens(image_tokens).prompt(ids, images, self.tower, front) if images else ids

    def generate(self, prompt: Prompt, images: Images = (), **settings: Any) -> Answer:
        """The answer to one prompt. settings: max_new_tokens, steps, seed, adapter, …, see engine.Request; on_step; and
        image_tokens, see ids()."""
        return self.generate_batch([prompt], [images], **settings)[0]

    def close(self) -> None:
        """Give the memory back; the end of a `with` does so too. Without it, Python gives it back when it next looks
        for reference cycles. A chat that still exists keeps the weights."""
        self.model.drop_session()
        self.__dict__.pop("tower", None)
        del self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Images] | None = None,
        on_step: Callable[[Step], None] | None = None,
        image_tokens: int | None = None,
        **settings: Any,
    ) -> list[Answer]:
        """The answers to several prompts, each with its images, computed together. Each is what the prompt would get
        alone with rows=[its number]."""
        request = Request(self._all_ids(prompts, images, image_tokens), self.generation, **settings)
        with self._lock:
            result = generate(self.model, request, on_step)
        rows = zip(prompts, request.prompts, result.tokens, result.ended, result.steps, strict=True)
        answers = []
        for prompt, ids, tokens, ended, steps in rows:
            chat = len(prompt) > 0 and isinstance(prompt[0], Mapping)
            reply = self.tokenizer.reply(tokens, ids) if chat else Reply(self.tokenizer.decode(tokens))
            answers.append(Answer(reply.text, tokens, ended, steps, *reply[1:]))
        return answers

    def stream(
        self,
        *prompts: Prompt,
        images: Sequence[Images] | None = None,
        every_step: bool = True,
        image_tokens: int | None = None,
        **settings: Any,
    ) -> Iterator[Step | Block]:
        """Yield steps and committed blocks as they come; every_step=False: blocks only. The last block is whole,
        whatever max_new_tokens is. On a GPU, a stream that goes on after this engine began another answer raises
        InputError."""
        ids = self._all_ids(prompts, images, image_tokens)
        return stream(self.model, Request(ids, self.generation, **settings), every_step)

    def _all_ids(
        self, prompts: Sequence[Prompt], images: Sequence[Images] | None, image_tokens: int | None
    ) -> list[Sequence[int]]:
        if isinstance(prompts, str):  # a text is a sequence too, of letters
            raise InputError("prompts is a text: give a list of prompts, or one to generate()")
        given = [()] * len(prompts) if images is None else images
        if len(given) != len(prompts):
            raise InputError(f"images of {len(given)} prompts for {len(prompts)}: give a list for each prompt")
        return [self.ids(prompt, shown, image_tokens) for prompt, shown in zip(prompts, given, strict=True)]

    def chat(
        self,
        system: str | None = None,
        thinking: bool | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        image_tokens: int | None = None,
        **settings: Any,
    ) -> Chat:
        """A conversation whose turns keep their keys and values, see chat.Chat. system: the text of a first message.
        thinking: the template's enable_thinking, which has its own default; InputError if the template has none.
        image_tokens: see ids(). On a GPU, another answer in between takes the conversation's memory, and the next turn
        is encoded as a whole."""
        tower = Once(lambda patches: self.tower(patches))

        def see(ids: Sequence[int], images: Sequence[Any]) -> Sequence[int]:
            return self.artifact.vision.with_tokens(image_tokens).prompt(ids, images, tower)

        first = [] if system is None else [{"role": "system", "content": system}]
        settings = {"see": see, "messages": [*first, *messages], **settings}
        return Chat(self.model, self.tokenizer.thinking(thinking), self.generation, **settings)

    def text(self, event: Step | Block, row: int = 0) -> str:
        """The text of a step's canvas or of a block, up to its end-of-sequence token. row: the prompt's number; "" once
        that prompt has left the batch."""
        if row not in event.rows:
            return ""
        tokens = event.canvas[event.rows.index(row)].tolist()
        stop = next((i for i, token in enumerate(tokens) if token in self.generation.eos_ids), len(tokens))
        return self.tokenizer.decode(tokens[:stop])


def load(
    path: Path | str,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    vram: int | None = None,
    adapters: Sequence[Path | str] | Mapping[str, Path | str] = (),
) -> Engine:
    """Open an artifact or a BF16 checkpoint, a directory or a .gguf. InputError for everything that is wrong with it.

    adapters: LoRA adapters (peft's directories) to apply beside the weights: a list's always, a dict's by their names,
    where a request has adapter="NAME". device: "cuda" or "cpu"; a GPU if there is one, unless given. dtype: of
    activations; bfloat16 on a GPU and float32 on a CPU, unless given. vram: bytes of the GPU to use; experts that do
    not fit wait in host memory. A warning names ggml types that have no kernels, and the memory that they take because
    they are decoded.
    """
    visible = torch.cuda.is_available()
    device = str(device or ("cuda" if visible else "cpu"))
    if device not in ("cuda", "cpu"):
        raise InputError(f"device is {device!r}, expected cuda (CUDA_VISIBLE_DEVICES says which) or cpu")
    if device == "cuda" and not visible:
        raise InputError("device cuda: no CUDA device is visible to torch; use cpu")
    if vram is not None and (device == "cpu" or dtype not in (None, torch.bfloat16)):
        raise InputError("vram: is for bfloat16 on a GPU")
    artifact = _adapted(open_artifact(path), adapters)
    for line in artifact.remarks:
        warnings.warn(line, stacklevel=2)
    return Engine(artifact, device, dtype, vram)


def _adapted(artifact: Artifact, adapters: Sequence[Path | str] | Mapping[str, Path | str]) -> Artifact:
    """The artifact with adapters; those of a dict are applied where a request names them."""
    if not adapters:
        return artifact
    named = isinstance(adapters, Mapping)
    pairs = list(adapters.items()) if isinstance(adapters, Mapping) else [(None, path) for path in adapters]
    opened = [open_adapter(Path(path).expanduser(), artifact.shapes, name) for name, path in pairs]
    return artifact.with_adapters(opened, () if named else None)
