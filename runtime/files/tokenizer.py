"""Text to ids and back, and chats to ids, by the checkpoint's own tokenizer and chat template.

Two sources give the same ids: a directory's tokenizer.json, or a .gguf's metadata, from which the tokenizer is rebuilt:

    " " -> "▁"  |  added tokens cut out whole  |  BPE merges in order  |  what is left as bytes <0x00> … <0xFF>

The `tokenizers` library is used directly; importing transformers for this would take seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import BOM, read_json, refuse_pointer
from dgq.runtime.files.reply import CHANNEL, END_CHANNEL, MARKERS, Reply, opens_thought, parse_reply

# GGUF token types (llama.h, enum llama_token_type): what a token is for.
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6

# The chat's own markers, <|turn>, <turn|>, <|"|>, <|image|>: a .gguf may type them NORMAL, and no merge builds them.
_MARKER = re.compile(r"<\|.+>|<.+\|>")

_GGUF_SPECIALS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}


class Tokenizer:
    """encode: raw text; chat: messages through the chat template; decode: ids to text; reply: ids to the parts of a
    model's reply."""

    def __init__(
        self, backend: tokenizers.Tokenizer, specials: Mapping[str, str], template: str | None, source: str
    ) -> None:
        """specials: template variables such as bos_token -> "<bos>"; source: the file's name in error messages."""
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._specials, self._template, self._source = backend, dict(specials), template, source
        self._control = {
            number
            for number, token in backend.get_added_tokens_decoder().items()
            if token.content not in MARKERS and (token.special or _MARKER.fullmatch(token.content))
        }
        self._variables: dict[str, Any] = {}  # that the template gets unless render() is given others

    @classmethod
    def from_dir(cls, path: Path) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja. InputError if one is unreadable."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        try:
            raw = file.read_bytes()
            refuse_pointer(file, raw)
            backend = tokenizers.Tokenizer.from_buffer(raw.removeprefix(BOM))
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{file}: not readable as a tokenizer: {error}") from None
        specials: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path / name).is_file():
                specials |= _named_tokens(read_json(path / name))
        return cls(backend, specials, template_of(path), str(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """Rebuilt from tokenizer.ggml.*; InputError naming `source` if that is missing or contradicts itself."""
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gemma4":
            raise InputError(f"{source}: tokenizer.ggml.model is {kind!r}, dgq rebuilds 'gemma4'")
        lists: dict[str, list[Any]] = {}
        for key in ("tokens", "token_type", "merges"):
            value = metadata.get(f"tokenizer.ggml.{key}")
            element = int if key == "token_type" else str
            if not isinstance(value, list) or not all(isinstance(one, element) for one in value):
                raise InputError(f"{source}: tokenizer.ggml.{key} is missing, or no list of {element.__name__}")
            lists[key] = value
        tokens: list[str] = lists["tokens"]
        specials = {}
        for name, key in _GGUF_SPECIALS.items():
            index = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(index, int):
                if not 0 <= index < len(tokens):
                    raise InputError(f"{source}: tokenizer.ggml.{key}_token_id {index} is outside the vocabulary")
                specials[f"{name}_token"] = tokens[index]
        backend = _rebuild(tokens, lists["token_type"], lists["merges"], specials.get("unk_token"), source)
        return cls(backend, specials, _template(metadata.get("tokenizer.chat_template"), source), source)

    def encode(self, text: str) -> list[int]:
        """Raw text, with <bos> in front unless it is there already."""
        bos = self._specials.get("bos_token")
        if bos is not None and not text.startswith(bos):
            text = bos + text
        return self._ids(text)

    def chat(self, messages: Sequence[Mapping[str, Any]], prefill: str = "", **variables: Any) -> list[int]:
        """Messages such as {"role": "user", "content": "…"}, rendered by the template and encoded; see render().
        prefill: how the answer begins."""
        return self._ids(self.render(messages, **variables) + prefill)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The template's text. variables reach the template (tools, enable_thinking, …); add_generation_prompt is True
        unless given. InputError if there is no template or it refuses the messages."""
        if self._template is None:
            raise InputError(f"{self._source}: has no chat template; give the prompt as raw text")
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **self._specials}
        given |= self._variables | variables
        try:
            return _environment().from_string(self._template).render(messages=list(messages), **given)
        except Exception as error:  # a template is somebody's program: it may divide by zero as well
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{self._source}: the chat template refuses these messages ({what})") from None

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def thinking(self, switch: bool | None) -> Tokenizer:
        """This tokenizer with the template's enable_thinking as given; None: as the template has it by itself.
        InputError if it is to think and the template knows no such switch."""
        if switch is None:
            return self
        if switch and self._template is not None and "enable_thinking" not in self._template:
            raise InputError(f"{self._source}: its chat template has no enable_thinking; this model cannot be told to")
        other = copy(self)
        other._variables = self._variables | {"enable_thinking": switch}
        return other

    def reply(self, ids: Sequence[int], prompt: Sequence[int] = ()) -> Reply:
        """The parts of a reply: answer, reasoning, tool calls. prompt: the tokens before it, which may have opened a
        thought already."""
        return parse_reply(self.decode(ids), opens_thought(self._end_of(prompt)))

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of the ids; control tokens (<bos>, <turn|>, …) only if keep_special. The marks of thoughts and tool
        calls (reply.MARKERS) always stay, so that a directory and a .gguf give the same text."""
        kept = list(ids) if keep_special else [token for token in ids if token not in self._control]
        return str(self._backend.decode(kept, skip_special_tokens=False))

    def _end_of(self, prompt: Sequence[int]) -> str:
        """The text of a prompt from its last turn or thought on."""
        marks = {self.token_id(mark) for mark in ("<|turn>", CHANNEL, END_CHANNEL)}
        places = (i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in marks)
        return self.decode([prompt[i] for i in range(next(places, 0), len(prompt))], True)

    def token_id(self, token: str) -> int | None:
        """The id of one token, e.g. "<turn|>"; None if there is no such token."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    @property
    def vocab(self) -> int:
        """How many ids there are, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{self._source}: the text, or a special token of tokenizer_config.json, is no Unicode"
            ) from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def _rebuild(
    tokens: list[str], types: list[int], merges: list[str], unknown: str | None, source: str
) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise InputError(
            f"{source}: tokenizer.ggml.tokens has {len(tokens)} entries, {len(vocab)} of them different, and "
            f"{len(types)} token types"
        )
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, gap, right = merge.partition(" ")
        if not (left and gap and right) or " " in right:  # no token holds a space: it is "▁"
            raise InputError(f"{source}: tokenizer.ggml.merges holds {merge!r}, expected two tokens")
        pairs.append((left, right))
    try:
        bpe = models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{source}: tokenizer.ggml.merges do not fit the tokens: {error}") from None
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED) or _MARKER.fullmatch(token)
    ]
    backend.add_tokens(added)
    return backend


def template_of(path: Path) -> str | None:
    """A directory's chat template: chat_template.jinja, or else what tokenizer_config.json has. InputError if it is
    not readable."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{file}: is not UTF-8 text") from None
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0].get("template") if named else None
    return _template(template, str(path))


def _template(template: Any, source: str) -> str | None:
    if template is not None and not isinstance(template, str):
        raise InputError(f"{source}: the chat template is a {type(template).__name__}, not text")
    return template


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The entries "…_token", also those under "extra_special_tokens": a string, or an object with its "content"."""
    extra = settings.get("extra_special_tokens")
    named = {}
    for key, value in {**settings, **(extra if isinstance(extra, dict) else {})}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            named[key] = text
    return named


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks an assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it. Templates come from the net: sandboxed, and nothing of theirs is kept."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        # Jinja's own filter escapes HTML, and ids would differ from what the model was trained on
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
