"""A reply's parts, against the reading that transformers has of Gemma 4's replies; and the same text from a directory's
tokenizer and a .gguf's, whatever its tool markers are flagged as."""

import json
from pathlib import Path

import pytest

from dgq.convert.plans.gguf_metadata import _token_type
from dgq.runtime.files.reply import MARKERS, Reply, opens_thought, parse_reply
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.files.tool_calls import ToolCall

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
QUOTE = '<|"|>'
CALL = f"<|tool_call>call:f{{a:{QUOTE}b{QUOTE}}}<tool_call|>"

# What Gemma 4 writes; transformers reads these too.
GEMMA = [
    "the fox",
    "<|channel>thought\na<channel|>b",
    "<|channel>thought\n<channel|>b",
    "<|channel>thought\na",
    "b<|channel>thought\nc<channel|>",
    CALL,
    f"<|channel>thought\nI need it.<channel|>Wait.{CALL}",
    "<|tool_call>call:f{}<tool_call|>",
    "<|tool_call>call:get{n:1,x:-2.5,e:1e3,t:true,f:false,z:null}<tool_call|>",
    f"<|tool_call>call:get{{list:[1,{QUOTE}a,b{QUOTE},[true]],in:{{deep:{{er:{QUOTE}}}{QUOTE}}}}}}}<tool_call|>",
    f'<|tool_call>call:say{{text:{QUOTE}He said "hi"\nand \\ left{QUOTE}}}<tool_call|>',
    f"{CALL}<|tool_call>call:g{{}}<tool_call|>",
]


@pytest.mark.parametrize("text", GEMMA)
def test_as_transformers_reads_it(text):
    serving = pytest.importorskip("transformers.cli.serving.utils")
    parsing = pytest.importorskip("transformers.utils.chat_parsing.response_parser")
    (template,) = (v for kinds, v in serving._RESPONSE_TEMPLATE_FALLBACKS.items() if "gemma4" in kinds)
    theirs = parsing.parse_response(text, template, prefix="<|turn>model\n")
    calls = tuple(ToolCall(**call["function"]) for call in theirs.get("tool_calls", ()))
    reply = parse_reply(text)
    assert (reply.text, reply.reasoning, reply.tool_calls) == (
        theirs.get("content", ""), theirs.get("reasoning_content", ""), calls,
    )  # fmt: skip
    assert reply.unfinished_thought == (text == "<|channel>thought\na")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the  quick ", Reply(" the  quick ")),
        ("<think>a</think>b", Reply("b", "a")),
        ("<think>\na\n</think>\n\nb", Reply("b", "a")),
        ("<thinking>a</thinking>b", Reply("b", "a")),
        ("a</think>b", Reply("b", "a")),  # the template wrote the beginning
        ("thought\na<channel|>b", Reply("b", "a")),
        ("<channel|>b", Reply("b")),
        ("<think>a", Reply("", "a", (), True)),
        ("b<think>c</think>d", Reply("bd", "c")),
        ("Write `<think>` and `</think>`.", Reply("Write `<think>` and `</think>`.")),
        ("A <think> in a sentence", Reply("A <think> in a sentence")),
        ("<|channel>final\nb", Reply("b")),
        ("<|channel>analysis\na<channel|><|channel>final\nb<channel|>", Reply("b", "a")),
        ("<|channel>thoughtful words<channel|>b", Reply("b", "thoughtful words")),
        ("<|channel>thought\na<|channel>thought\nc<channel|>b", Reply("b", "a\n\nc")),
        ("<|channel>thought", Reply("", "", (), True)),
        ("<|channel>thought\na<channel|>b<|channel>thought\nc", Reply("b", "a\n\nc", (), True)),
        (f"<|channel>thought\na{CALL}", Reply("", "a", (ToolCall("f", {"a": "b"}),))),
        (f"<think>a</think>{CALL}", Reply("", "a", (ToolCall("f", {"a": "b"}),))),
        (f"<|tool_call>call:f{{a:{QUOTE}b{QUOTE}", Reply(f"<|tool_call>call:f{{a:{QUOTE}b{QUOTE}")),  # cut off
        ("<|tool_call>nothing<tool_call|>", Reply("<|tool_call>nothing<tool_call|>")),
        ("<|tool_call>call:a-b.c{k:[1,2}<tool_call|>", Reply("<|tool_call>call:a-b.c{k:[1,2}<tool_call|>")),
        (f"<|tool_call>call:f{{a:{'[' * 999}<tool_call|>", Reply(f"<|tool_call>call:f{{a:{'[' * 999}<tool_call|>")),
        (f"<|tool_call>call:a-b.c{{x:{QUOTE}<tool_call|>{QUOTE}}}}}<tool_call|>",
         Reply("", "", (ToolCall("a-b.c", {"x": "<tool_call|>"}),))),
        ('<|tool_call>call:f{"a": "b\\n", c: Paris , d: 01}<tool_call|>',
         Reply("", "", (ToolCall("f", {"a": "b\n", "c": "Paris", "d": "01"}),))),
    ],
)  # fmt: skip
def test_dialects_and_what_is_broken(text, expected):
    assert parse_reply(text) == expected


def test_thoughts_that_the_prompt_opens():
    for prompt, opened in (
        ("<|turn>model\n", False),
        ("<|turn>model\n<|channel>thought\n<channel|>", False),
        ("<|tool_response>x<tool_response|><|channel>thought\n", True),
        ("<|channel>thought\na<|turn>model\n", False),
        ("<|turn>model\n<|channel>final\n", False),
        ("<|turn>model\n<think>\n", True),
        ("<|turn>model\n<think>\n\n</think>\n", False),
    ):
        assert opens_thought(prompt) is opened, prompt
    assert parse_reply("a<channel|>b", True) == parse_reply("a</think>b", True) == Reply("b", "a")
    assert parse_reply("a", True) == Reply("", "a", (), True)
    tokenizer = Tokenizer.from_dir(TINY)
    prompt = tokenizer.encode("<|turn>user\nx<turn|>\n<|turn>model\n<|channel>thought\n")
    ids = tokenizer.encode("a")[1:]
    assert tokenizer.reply(ids, prompt) == Reply("", "a", (), True)
    assert tokenizer.reply(ids, tokenizer.encode("<|turn>model\n<think>\n")).unfinished_thought
    assert tokenizer.reply(ids, tokenizer.encode("<|channel>thought\n<turn|><|turn>model\n")) == Reply("a")


def test_messages_and_json():
    reply = parse_reply(f"<think>a</think>b{CALL}")
    assert reply.message() == {
        "role": "assistant", "content": "b", "reasoning_content": "a",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}],
    }  # fmt: skip
    assert json.loads(json.dumps(reply.json())) == {
        "text": "b", "reasoning": "a", "tool_calls": [{"name": "f", "arguments": {"a": "b"}}],
        "unfinished_thought": False,
    }  # fmt: skip
    assert parse_reply("b").message() == {"role": "assistant", "content": "b"}


def test_markers_are_visible_in_a_gguf():
    """llama.cpp's converter (Gemma4Model.set_vocab) types seven tokens 4, USER_DEFINED, before it asks whether they are
    special; the released tokenizer_config.json names them all, so that they are."""
    for token in (
        "<|channel>",
        "<channel|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        QUOTE,
    ):
        assert _token_type(9, token, frozenset([9])) == 4
    assert _token_type(9, "<|turn>", frozenset([9])) == 3


@pytest.mark.parametrize("special", [False, True])
def test_the_same_text_whatever_the_flags(tmp_path, special):
    """The released tokenizer flags its markers as special; older copies do not. transformers' text of the unflagged
    ones is the right one."""
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / file).write_bytes((TINY / file).read_bytes())
    raw = json.loads((TINY / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = token["content"] not in MARKERS
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    backend = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for token in raw["added_tokens"]:
        token["special"] = special or token["content"] not in MARKERS
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_dir(tmp_path)
    text = f"<bos><|turn>model\n<|channel>thought\na<channel|>{CALL}<|tool_response>x<tool_response|><turn|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=True)
    assert all(marker in tokenizer.decode(ids) for marker in MARKERS)
    assert tokenizer.decode(ids, keep_special=True) == text
