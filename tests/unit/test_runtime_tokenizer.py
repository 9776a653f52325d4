"""Ids and text against transformers' AutoTokenizer, and a tokenizer rebuilt from a .gguf against its original."""

import json
from pathlib import Path

import pytest

from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.runtime.files.reply import MARKERS
from dgq.runtime.files.tokenizer import Tokenizer

TESTS = Path(__file__).parent.parent
TINY_A = TESTS / "golden" / "tinyA"
DIRS = {"tinyA": TINY_A, "tiny": TESTS.parent / "recipes" / "tiny"}
TEXTS = [
    "",
    "Hello world",
    "  the  quick\n\n brown\tfox the and on ",
    "äöü ß 漢字 かな العربية 😀👩‍👩‍👧 \u200b\ufeff",
    "\x00\x01\x7f\u0085",
    "▁ ▁the ▁",
    "<0x0A><0xFF>",
    "<bos><pad><eos><unk><mask>",
    '<|turn>user\nhi<turn|>\n<|channel>thought\n<channel|>the<|tool_call>call:f{x:<|"|>1<|"|>}<tool_call|>',
    "<|tool_response>x<tool_response|><|image|>the<|turn",
    "<unused134>",
    "the" * 300,
]
CHATS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\n\n<b> & 'c' \"d\" ä"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "  spaces  "},
    ],
]


@pytest.mark.parametrize("name", DIRS)
def test_against_transformers(name):
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(DIRS[name])
    ours = Tokenizer.from_dir(DIRS[name])
    for text in TEXTS:
        ids = auto.encode(text, add_special_tokens=False)
        bos = [] if text.startswith("<bos>") else [auto.bos_token_id]
        assert ours.encode(text) == bos + ids
        assert ours.decode(ids, keep_special=True) == auto.decode(ids)
        shown = [one for one in ids if auto.convert_ids_to_tokens(one) in MARKERS]
        if not shown:  # markers stay, see test_reply.py
            assert ours.decode(ids) == auto.decode(ids, skip_special_tokens=True)
    for chat in CHATS:
        for prompt in (True, False):
            expected = auto.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
            assert ours.chat(chat, add_generation_prompt=prompt) == expected
            assert ours.render(chat, add_generation_prompt=prompt) == auto.apply_chat_template(
                chat, add_generation_prompt=prompt, tokenize=False
            )


def test_rebuilt_from_gguf():
    directory = Tokenizer.from_dir(TINY_A)
    rebuilt = Tokenizer.from_gguf(GGUFReader(TINY_A / "reference.Q4_K_M.gguf").metadata, "x.gguf")
    assert rebuilt.vocab == directory.vocab == 512
    for text in TEXTS:
        ids = directory.encode(text)
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids, keep_special=True) == directory.decode(ids, keep_special=True)
        assert rebuilt.decode(ids) == directory.decode(ids)
    for chat in CHATS:
        assert rebuilt.chat(chat) == directory.chat(chat)
    assert rebuilt.token_id("<turn|>") == directory.token_id("<turn|>") == 357
    assert rebuilt.token_id("nothing") is None


def with_template(tmp_path, template, **settings):
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((TINY_A / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return Tokenizer.from_dir(tmp_path)


def test_templates_see_what_transformers_gives_them(tmp_path):
    template = """{{ bos_token }}
    {%- for m in messages %}
        {%- if loop.index > 2 %}{% break %}{% endif %}
        {%- generation %}[{{ m | tojson }}]{% endgeneration %}
    {%- endfor %}
{% if tools is none %}none{% endif %} {{ flag }} {{ strftime_now("%Y") | length }} {{ eot_token }}"""
    tokenizer = with_template(tmp_path, template, extra_special_tokens={"eot_token": "<turn|>"}, chat_template="")
    messages = [{"content": "<é>"}, {"content": "b"}, {"content": "c"}]
    text = tokenizer.render(messages, flag=7)
    assert text == '<bos>[{"content": "<é>"}][{"content": "b"}]none 7 4 <turn|>'
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert auto.apply_chat_template(messages, tokenize=False, flag=7) == text


def test_named_templates(tmp_path):
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    assert with_template(tmp_path, None, chat_template=named).render([]) == "yes"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
    ],
)
def test_bad_templates(tmp_path, template, words):
    with pytest.raises(InputError, match=words) as error:
        with_template(tmp_path, template).chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not readable as a tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_bad_gguf_metadata():
    metadata = GGUFReader(TINY_A / "reference.Q4_K_M.gguf").metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    for changes, words in (
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": [*tokens[:-1], tokens[0]]}, "511 of them different"),
        ({"token_type": [1]}, "1 token types"),
        ({"merges": ["a b c"]}, "holds 'a b c'"),
        ({"merges": ["q zz"]}, "do not fit the tokens"),
        ({"bos_token_id": 512}, "bos_token_id 512 is outside"),
    ):
        changed = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
        with pytest.raises(InputError) as error:
            Tokenizer.from_gguf(changed, "x.gguf")
        assert str(error.value).startswith("x.gguf: ") and words in str(error.value)
