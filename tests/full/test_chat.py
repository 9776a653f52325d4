"""Conversations: a cache that is kept from turn to turn is what encoding everything anew gives, in both engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.runtime.engine import engine, turns
from dgq.runtime.engine.batch import encode_each
from dgq.runtime.engine.chat import Chat
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.engine.plain import Plain
from dgq.runtime.engine.turns import SessionStore, TurnOnSlots, Turns
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.files.images import Once, parted, placed
from dgq.runtime.files.reply import Reply
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.model.session import Session
from dgq.runtime.model.slots import CanvasView
from dgq.runtime.shape.pictured import Pictured, marks_of

TESTS = Path(__file__).parent.parent
SAID = (
    "Sort: wind apple king door",
    "Tell me a long story about a fox, a bear, a dog and a cat who met in a house by the river one day.",
    "Reverse: dog cat sun",
    "What is 3 + 4?",
    "Sort: zoo ant",
)


TEXTS = [
    json.loads(line)["text"][:500]
    for line in (TESTS.parent / "recipes" / "prompts" / "heldout_text.jsonl").read_text().splitlines()[:4]
]


@pytest.fixture(scope="module")
def artifact():
    return open_artifact(TESTS.parent / "recipes" / "tiny")


@pytest.fixture(scope="module")
def model(artifact):
    return artifact.load("cpu", torch.float32)


@pytest.fixture(params=["cache", "slots"])
def store(request, monkeypatch, model) -> Iterator[str]:
    """Where a conversation lies: as generate() has it on a CPU, and as on a GPU."""
    if request.param == "slots":
        monkeypatch.setattr(engine, "TurnOnCache", TurnOnSlots)
    yield request.param
    model.drop_session()


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def endless(artifact: Any) -> Any:
    """Replies that fill every block that they may have: no token ends them."""
    return replace(artifact.generation, eos_ids=(artifact.config.vocab - 1,))


def logits_of(store: Any, model: Any, canvas: torch.Tensor) -> torch.Tensor:
    """Of a canvas behind what a conversation's store holds."""
    if hasattr(store, "cache"):
        return model.decode(canvas, store.cache)
    state, view = store.session.state, CanvasView(store.session.slots, 1, model.config.canvas)
    kept = state.canvas.clone()
    state.canvas.copy_(canvas)
    state.soft.zero_()
    found = store.session.backend.decode(state, view)
    state.canvas.copy_(kept)
    return found


def recomputed(model: Any, ids: Any, canvas: torch.Tensor) -> torch.Tensor:
    if isinstance(ids, Pictured):
        return model.decode(canvas, encode_each(model, [ids], len(ids) + model.config.canvas))
    cache = model.new_cache(1)
    model.encode(torch.tensor([ids]), cache)
    return model.decode(canvas, cache)


@pytest.fixture
def worst(monkeypatch, model) -> list[float]:
    """The largest difference of a logit, at each turn's beginning."""
    found: list[float] = []
    begin = Turns.begin
    canvas = torch.arange(model.config.canvas)[None] * 7 % model.config.vocab

    def compared(self: Turns, place: Any, ids: Any, window: int) -> None:
        begin(self, place, ids, window)
        assert self.ids == marks_of(ids)
        with torch.inference_mode():
            found.append(float((logits_of(place, model, canvas) - recomputed(model, ids, canvas)).abs().max()))

    monkeypatch.setattr(Turns, "begin", compared)
    return found


def test_kept_turns_equal_a_full_recompute(artifact, model, store, worst):
    """Short replies, which end in their first block: all of every turn is kept, but for what the next one adds."""
    chat = Chat(model, artifact.tokenizer, artifact.generation, seed=3)
    before = 0
    for said in SAID:
        reply = chat.ask(said, max_new_tokens=128)
        assert reply.ended and reply.prompt_tokens - reply.encoded == before
        before = reply.prompt_tokens
    assert len(chat.messages) == 2 * len(SAID) and reply.prompt_tokens > model.config.window
    assert len(worst) == len(SAID) and max(worst) < 1e-4


def test_turns_across_the_window(artifact, model, store, worst):
    """Replies of several blocks, whose text makes other tokens than they are: what was committed is cut off, the
    windows that were saved come back, and of the turns before nothing is encoded again."""
    chat = Chat(model, artifact.tokenizer, endless(artifact), seed=5)
    canvas, window = model.config.canvas, model.config.window
    before = 0
    for said in TEXTS[:3]:
        reply = chat.ask(said, max_new_tokens=3 * canvas - 1, steps=1)
        assert len(reply.steps) == 3 and len(reply.tokens) == 3 * canvas - 1
        assert reply.prompt_tokens - reply.encoded >= before
        before = len(artifact.tokenizer.chat(chat.messages[:-1], add_generation_prompt=False))
        held = chat._turns.ids
        assert len(held) == reply.prompt_tokens + 2 * canvas, "the last block is in no cache"
        noise = torch.arange(canvas)[None]
        with torch.inference_mode():
            after = logits_of(chat._turns.store, model, noise) - recomputed(model, held, noise)
        assert float(after.abs().max()) < 1e-4
    assert reply.prompt_tokens > 6 * window and max(worst) < 1e-4


def test_a_conversation_is_its_prompts_alone(artifact, model, store):
    """Each reply is what one call with the whole conversation gives."""
    chat = Chat(model, artifact.tokenizer, artifact.generation, seed=3)
    for number, said in enumerate(SAID[:3]):
        asked = [*chat.messages, {"role": "user", "content": said}]
        reply = chat.ask(said, max_new_tokens=128)
        ids = artifact.tokenizer.chat(asked)
        alone = generate(model, Request([ids], artifact.generation, 128, seed=3, rows=[number]))
        assert alone.tokens == [reply.tokens] and alone.steps == [reply.steps]


def test_a_reply_that_just_fits_ends_as_an_answer_does(artifact, model, store):
    """Its end-of-sequence token is the first one too many."""
    for limit, ended in ((4, False), (5, True)):
        reply = Chat(model, artifact.tokenizer, artifact.generation, seed=3).ask(SAID[0], max_new_tokens=limit)
        ids = artifact.tokenizer.chat([{"role": "user", "content": SAID[0]}])
        answer = generate(model, Request([ids], artifact.generation, limit, seed=3))
        assert reply.tokens == answer.tokens[0] and len(reply.tokens) == 4
        assert reply.ended == answer.ended[0] == ended


def test_one_turn_at_a_time(artifact, model, store):
    """An older one neither spoils what a newer one keeps nor is it said."""
    chat = Chat(model, artifact.tokenizer, artifact.generation, seed=3)
    older = chat.stream("Once upon a time", max_new_tokens=128, steps=2)
    next(older)
    reply = chat.ask(SAID[0], max_new_tokens=64)
    with pytest.raises(InputError, match="another turn was begun"):
        list(older)
    assert reply.tokens == Chat(model, artifact.tokenizer, artifact.generation, seed=3).ask(SAID[0]).tokens
    assert [message["content"] for message in chat.messages] == [SAID[0], reply.text]


def noise(seed: int) -> PIL.Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return PIL.Image.fromarray(torch.randint(0, 256, (112, 160, 3), generator=generator).byte().numpy())


def test_images_in_any_turn(artifact, model, store, worst):
    """An image is seen once and stays in the cache; one of the same size in its place is another; each reply is what
    one call with the whole conversation gives."""
    seen: list[Any] = []
    vision, eyes = artifact.vision, artifact.vision.tower("cpu", torch.float32)

    def counted(patches):
        seen.append(patches)
        return eyes(patches)

    def see(ids, images):
        return vision.prompt(ids, images, tower)

    tower = Once(counted)
    chat = Chat(model, artifact.tokenizer, endless(artifact), seed=3, see=see)
    turns = [(SAID[0], [noise(1)]), (SAID[2], []), ("Sort: <|image|> zoo ant <|image|>", [noise(2), noise(1)])]
    before = 0
    for number, (said, images) in enumerate([*turns, (SAID[4], [])]):
        if number == 3:
            chat.messages[0] = {"role": "user", "content": parted(SAID[0], [noise(4)])}
        asked = [*chat.messages, {"role": "user", "content": parted(said, images)}]
        reply = chat.ask(said, images=images, max_new_tokens=191, steps=2)
        assert reply.prompt_tokens - reply.encoded >= before or number == 3
        plain, shown, _ = placed(artifact.tokenizer, asked)
        request = Request([see(plain, shown)], endless(artifact), 191, seed=3, steps=2, rows=[number])
        alone = generate(model, request)
        assert alone.tokens == [reply.tokens]
        before = len(see(artifact.tokenizer.chat(asked, add_generation_prompt=False), shown))
    assert reply.encoded == reply.prompt_tokens > 3 * 60 and len(seen) == 3
    assert len(worst) == 4 and max(worst) < 1e-4


def test_the_command_takes_images(tmp_path) -> None:
    """In a conversation's first line, or before any other; what is wrong with one is said before anybody answers."""
    noise(1).save(tmp_path / "a.png")
    later = f"Sort: wind apple\n/image {tmp_path / 'a.png'}\nReverse: dog cat sun\n".encode()

    def run(*images: str, said: bytes = b"Sort: wind apple\nReverse: dog cat sun\n") -> Any:
        given = ["--steps", "2", *(word for image in images for word in ("--image", str(tmp_path / image)))]
        return CliRunner().invoke(main, ["run", "tiny", "--device", "cpu", "--chat", "--json", *given], input=said)

    turns = [json.loads(line) for line in run("a.png", "a.png").stdout.splitlines()]
    plain = [json.loads(line) for line in run().stdout.splitlines()]
    more = [one["prompt_tokens"] - other["prompt_tokens"] for one, other in zip(turns, plain, strict=True)]
    assert min(more) > 2 * 60 and turns[1]["encoded"] < 60
    turns = [json.loads(line) for line in run(said=later).stdout.splitlines()]
    assert turns[0] | {"load_s": 0, "generate_s": 0} == plain[0] | {"load_s": 0, "generate_s": 0}
    assert turns[1]["prompt_tokens"] - plain[1]["prompt_tokens"] > 60 and len(turns) == 2
    assert "none.png: no such file" in run(said=b"/image none.png\n").stderr
    failed = run("b.png")
    assert failed.exit_code == 2 and failed.stderr.count("\n") == 1 and "b.png: no such file" in failed.stderr


def test_no_two_turns_draw_the_same(artifact, model):
    """From torch's stream as well: turn n is generate()'s with seed + n."""
    chat = Chat(model, artifact.tokenizer, artifact.generation, seed=3, rng="torch")
    for number, said in enumerate((TEXTS[0], TEXTS[1])):
        ids = artifact.tokenizer.chat([*chat.messages, {"role": "user", "content": said}])
        requests = [Request([ids], artifact.generation, 64, seed=3 + n, steps=2, rng="torch") for n in range(2)]
        tokens = [generate(model, request).tokens[0] for request in requests]
        assert chat.ask(said, max_new_tokens=64, steps=2).tokens == tokens[number] != tokens[1 - number]


def test_what_was_written_anew_is_encoded_anew(artifact, model, store, worst):
    chat = Chat(model, artifact.tokenizer, endless(artifact), messages=[system("Be brief.")], seed=1)
    for said in SAID[:2]:
        chat.ask(said, max_new_tokens=200, steps=2)
    chat.messages[1] = {"role": "user", "content": "Sort: zoo ant"}
    reply = chat.ask(SAID[2], max_new_tokens=64, steps=2)
    assert reply.encoded == reply.prompt_tokens, "the windows of so early a token are gone"
    assert chat.ask(SAID[3], max_new_tokens=64, steps=2).encoded < reply.prompt_tokens
    assert max(worst) < 1e-4


def test_an_abandoned_turn_never_was(artifact, model, store, worst):
    chat = Chat(model, artifact.tokenizer, endless(artifact), seed=1)
    chat.ask(SAID[0], max_new_tokens=64, steps=2)
    said = list(chat.messages)
    events = chat.stream(SAID[1], max_new_tokens=256, steps=2, every_step=False)
    next(events), next(events), next(events)
    events.close()
    assert chat.messages == said
    chat.ask(SAID[2], max_new_tokens=64, steps=2)
    assert max(worst) < 1e-4
    shown = [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]
    with pytest.raises(InputError, match="text alone"):
        Chat(model, artifact.tokenizer, artifact.generation, messages=shown).ask("What is this?")
    with pytest.raises(InputError, match=r"the text has 1 <\|image\|> for 2 images"):
        chat.ask("What is <|image|>?", images=["cat.png", "dog.png"])
    with pytest.raises(InputError, match="no image is given"):
        chat.ask("What is <|image|>?")
    with pytest.raises(InputError, match="exceed the context"):
        chat.ask("wind " * 3000)
    assert len(chat.messages) == 4
    chat.ask(SAID[3], max_new_tokens=64, steps=2)
    assert max(worst) < 1e-4


def test_an_interrupted_turn_never_was(artifact, model, store, worst, monkeypatch):
    """Whether it stops while its prompt is encoded or one of its blocks: keys that were half written are not used."""
    chat = Chat(model, artifact.tokenizer, endless(artifact), messages=[system(TEXTS[0])], seed=1)
    chat.ask(SAID[0], max_new_tokens=64, steps=2)
    append, calls = type(model).append, []
    for stop in (1, 2, 4):

        def stopping(self: Any, *args: Any, stop: int = stop) -> None:
            calls.append(stop)
            append(self, *args)
            if calls.count(stop) == stop:
                raise KeyboardInterrupt

        said = list(chat.messages)
        with monkeypatch.context() as patched:
            patched.setattr(type(model), "append", stopping)
            with pytest.raises(KeyboardInterrupt):
                chat.ask(TEXTS[1], max_new_tokens=256, steps=1)
        assert chat.messages == said
        chat.ask(SAID[2], max_new_tokens=64, steps=2)
    assert max(worst) < 1e-4


@pytest.mark.parametrize("back", [0, 1, 2, 3, 40])
def test_prompts_part_before_the_end(artifact, model, back):
    """A canvas has been written behind the first prompt, over what a ring held of the tokens before the window: the
    windows that were saved come back, unless nothing of the window is gone."""
    text = artifact.tokenizer.encode(" ".join(TEXTS))
    config, kept = artifact.config, Turns()
    session = Session(Plain(model), 1, 400, artifact.generation.sampler)
    store = SessionStore(session)
    kept.settled = 100
    canvas = torch.arange(config.canvas)[None] * 7 % config.vocab
    with torch.inference_mode():
        for ids in (text[:150], text[: 150 - back] + text[200:240]):
            kept.begin(store, ids, config.window)
            found = logits_of(store, model, canvas)
            assert float((found - recomputed(model, ids, canvas)).abs().max()) < 1e-4
    assert kept.encoded == (40 if back < 2 else 90 - back)


def test_slots_grow_and_are_lent(artifact, model, monkeypatch, worst):
    """A conversation takes its keys along when its slots get too few or it is asked for other steps; when another
    batch has had them, it starts anew."""
    monkeypatch.setattr(engine, "TurnOnCache", TurnOnSlots)
    monkeypatch.setattr(turns, "ROOM", 128)
    chat = Chat(model, artifact.tokenizer, endless(artifact), seed=2)
    sizes, encoded = [], []
    for said, steps in zip((*SAID[:2], *TEXTS[:2]), (1, 1, 1, 2), strict=True):
        reply = chat.ask(said, max_new_tokens=64, steps=steps)
        sizes.append(model.session.slots.capacity)
        encoded.append(reply.prompt_tokens - reply.encoded)
    assert len(set(sizes)) > 2 and sizes == sorted(sizes) and encoded == sorted(set(encoded))
    with torch.inference_mode():
        model.session.start([artifact.tokenizer.encode("Once upon a time")])
    reply = chat.ask("And then?", max_new_tokens=64, steps=3)
    assert reply.encoded == reply.prompt_tokens and max(worst) < 1e-4
    model.drop_session()


def test_the_command(monkeypatch, artifact) -> None:
    """Lines of standard input are turns; what a model writes cannot steer a terminal."""

    def run(*arguments: str, said: bytes = b"Sort: wind apple king door\n\n  Reverse: dog cat sun \n") -> Any:
        return CliRunner().invoke(main, ["run", "tiny", "--device", "cpu", "--chat", *arguments], input=said)

    talk = run()
    assert talk.exit_code == 0 and talk.stdout.splitlines() == ["apple door king wind", "sun cat dog"]
    turns = [json.loads(line) for line in run("--json").stdout.splitlines()]
    assert [turn["text"] for turn in turns] == ["apple door king wind", "sun cat dog"]
    assert turns[1]["prompt_tokens"] - turns[1]["encoded"] == turns[0]["prompt_tokens"] == turns[0]["encoded"]
    for arguments, said, problem in (
        (("--thinking",), b"a\n", "has no enable_thinking"),
        ((), b"a\n\xff\n", "line 2 of standard input is not valid UTF-8"),
        (("--max-new-tokens", "4096"), b"a\n", "exceed the context of 2048"),
    ):
        failed = run(*arguments, said=said)
        assert failed.exit_code == 2 and failed.stderr.count("\n") == 1 and problem in failed.stderr
    assert CliRunner().invoke(main, ["run", "tiny"]).exit_code == 2
    assert "add --chat" in CliRunner().invoke(main, ["run", "tiny", "--thinking", "a"]).stderr
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "a\x1b]0;x\x07\tb\x9b2J\r\nc\u202e👩\u200d👩 é")
    assert run("a").stdout == "a\\x1b]0;x\\x07\tb\\x9b2J\nc\\u202e👩\u200d👩 é\n"


THINKS = (
    "{{ bos_token }}{% if enable_thinking %}<|turn>system\n<|think|><turn|>\n{% endif %}"
    "{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
    "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)


def thinker(tmp_path: Path, template: str = THINKS) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TESTS / "golden" / "tinyA" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    return Tokenizer.from_dir(tmp_path)


def test_thoughts_are_told_apart_and_not_told_again(tmp_path):
    tokenizer = thinker(tmp_path)
    said = [{"role": "user", "content": "the"}]
    assert (
        "think" in tokenizer.thinking(True).render(said) and "think" not in tokenizer.thinking(None).render(said)[:30]
    )
    assert tokenizer.thinking(False).render(said).endswith("<|channel>thought\n<channel|>")
    for text, found in (
        ("the quick", ("the quick", "")),
        (" the  quick ", (" the  quick ", "")),
        ("<|channel>thought\nthe quick\n<channel|>the fox", ("the fox", "the quick")),
        ("<|channel>thought\n<channel|>the fox", ("the fox", "")),
        ("<|channel>thought\nthe quick", ("", "the quick")),
        ("the<|channel>thought\na<channel|> fox<|channel>thought\nb\n<channel|>", ("the fox", "a\n\nb")),
        ("<channel|>the", ("the", "")),
    ):
        assert tokenizer.reply(tokenizer.encode(text)[1:])[:2] == found
    with pytest.raises(InputError, match="no enable_thinking"):
        thinker(tmp_path, "{{ messages }}").thinking(True)


def test_a_template_that_writes_turns_anew(tmp_path, artifact, model, store, worst, monkeypatch):
    """With thoughts in the generation prompt that the next turn does not have, and in the reply."""
    tokenizer = thinker(tmp_path)
    monkeypatch.setattr(Tokenizer, "reply", lambda self, ids, prompt: Reply("the fox", "quick"))
    chat = Chat(model, tokenizer.thinking(False), endless(artifact))
    before = 0
    for said in SAID:
        reply = chat.ask(said, max_new_tokens=200, steps=2)
        assert reply.prompt_tokens - reply.encoded >= before
        before = len(tokenizer.chat(chat.messages[:-1], add_generation_prompt=False))
    assert chat.messages[1] == {"role": "assistant", "content": "the fox", "reasoning_content": "quick"}
    assert max(worst) < 1e-4
