"""The data that `tiny` learns from: two public texts, five small tasks, and a tokenizer of Gemma's kind.

Text comes from Debian packages, so that anyone can rebuild it:

    apt-get install bible-kjv bible-kjv-text wordnet-base
    python -m dgq.recipes.tiny_data --work DIR        # DIR/tokens.npz, recipes/tiny/tokenizer*, recipes/prompts/*

Tasks are chats whose answer follows from the prompt alone (copy, reverse, sort, add, look up). They matter for a
quantisation toolkit: an exact answer shows a damaged model at once, and a certain answer lets the sampler stop early,
which is the behaviour that 4-bit weights tend to break first. One tenth of all instances, chosen by a hash of what is
asked rather than of how it is phrased, is held out; so is one document in twenty. Training never sees those.

The tokenizer is a byte-fallback BPE without a pre-tokenizer, as Gemma's. No merge can cross a word because the merges
are learned on words: optional "▁" and letters, or one punctuation mark; digits and newlines stay alone.
"""

import argparse
import json
import random
import re
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
VOCAB = 2048
LENGTH = 256  # tokens a training sequence
MORE_TEXTS = 336  # of calibration, besides those that come with a task each
PAD, EOS, BOS, UNK, MASK, TURN, TURN_END = range(7)
NAMED = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>"]
NAMED += ["<tool_call|>", "<|tool_response>", "<tool_response|>", "<|image>", "<|image|>", "<image|>", '<|"|>']
ROLES = {"sot_token": "<|turn>", "eot_token": "<turn|>", "soc_token": "<|channel>", "eoc_token": "<channel|>"}
ROLES |= {"stc_token": "<|tool_call>", "etc_token": "<tool_call|>", "str_token": "<|tool_response>"}
ROLES |= {"etr_token": "<tool_response|>", "escape_token": '<|"|>'}
ROLES |= {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
TEMPLATE = """{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|image|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""

_WORDS = """
air ant apple arm army ash bag bank barn bear bed bee bell bird blood boat body bone book bow box boy branch
bread brick bull bush butter cake calf camel camp cat cave chain chair child city clay cloth cloud coal coat
corn cow crown cup day deer dog door dove dream dust eagle ear earth egg eye face farm father field fig fire
fish flame flax floor flower foot fox fruit garden gate girl glass goat gold grain grape grass hair hall ham
hand hat head heart hen hill honey horn horse house ice ink iron island jar judge key king kite knife lake
lamb lamp land leaf leg lily lion lip locust man map meat milk mill moon mother mouse mouth nail neck nest net
night nose oak oil olive owl ox pan path pear pen pig pit plant pool queen rain ram ring river road robe rock
roof room root rope rose sack salt sand sea seed sheep ship shoe silver sister smoke snake snow son spear
spoon star stone street sun sword table tent thorn tooth tower tree valley vine wall water wave wheat wheel
wind window wine wing wolf woman wood wool year
"""
_NAMES = """
Adam Anna Ben Clara Dan David Dora Emma Eva Frank Fred Grace Hans Helen Ida Jack Jane John Karl Kate Leo Lisa
Luke Maria Mark Mary Max Nina Nora Olga Oscar Otto Paul Peter Rosa Ruth Sam Sara Tom Vera
"""
WORDS, NAMES = _WORDS.split(), _NAMES.split()
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "purple", "orange", "golden"]
THINGS = ["key", "hat", "cup", "coat", "door", "book", "lamp", "boat", "ring", "bag", "house", "chair"]


@dataclass(frozen=True)
class Task:
    task: str
    prompt: str
    answer: str
    asked: str  # what is asked, however it is phrased: the hold-out hash reads this

    @property
    def held_out(self) -> bool:
        return zlib.crc32(f"{self.task} {self.asked}".encode()) % 10 == 0


def list_task(kind: str, rng: random.Random) -> Task:
    """Copy, reverse or sort a few words."""
    low, high = {"copy": (3, 10), "reverse": (3, 7), "sort": (3, 6)}[kind]
    words = rng.sample(WORDS, rng.randint(low, high))
    answer = {"copy": words, "reverse": words[::-1], "sort": sorted(words)}[kind]
    said = {
        "copy": ("Copy:", "Repeat these words:"),
        "reverse": ("Reverse:", "Say these words backwards:"),
        "sort": ("Sort:", "Put these words in order:"),
    }
    return Task(kind, f"{rng.choice(said[kind])} {' '.join(words)}", " ".join(answer), " ".join(words))


def add_task(rng: random.Random) -> Task:
    below = rng.choices((100, 1000), (3, 1))[0]
    a, b = rng.randrange(below), rng.randrange(below)
    said = rng.choice(("Add {} and {}.", "What is {} plus {}?"))
    return Task("add", said.format(a, b), str(a + b), f"{min(a, b)} {max(a, b)}")


def lookup_task(rng: random.Random) -> Task:
    """Two to four facts, then a question about one or more of them."""
    thing, names = rng.choice(THINGS), rng.sample(NAMES, rng.randint(2, 4))
    owned = dict(zip(names, rng.sample(COLOURS, len(names)), strict=True))
    facts = " ".join(f"The {thing} of {n} is {c}." for n, c in owned.items())
    asked = rng.sample(names, rng.randint(1, len(names)))
    *most, last = [f"of {n}" for n in asked]
    prompt = f"{facts} What is the {thing} {', '.join(most)}{' and ' if most else ''}{last}?"
    return Task("lookup", prompt, " ".join(owned[n] for n in asked), prompt)


KINDS: dict[str, Callable[[random.Random], Task]] = {k: partial(list_task, k) for k in ("copy", "reverse", "sort")}
KINDS |= {"add": add_task, "lookup": lookup_task}


def tasks(rng: random.Random, held_out: bool, weights: tuple[int, ...] = (1, 1, 1, 1, 1)) -> Iterator[Task]:
    """Endless tasks of one side of the hold-out."""
    while True:
        task = KINDS[rng.choices(list(KINDS), weights)[0]](rng)
        if task.held_out == held_out:
            yield task


def chat(turns: list[Task]) -> str:
    """The chat as TEMPLATE writes it, without the trailing newline: what training sees is what generation will see."""
    ask = "<|turn>user\n{}<turn|>\n<|turn>model\n{}<turn|>"
    return "<bos>" + "\n".join(ask.format(t.prompt, t.answer) for t in turns)


def chapters() -> list[list[str]]:
    """The King James Bible, verse by verse."""
    run = subprocess.run(["bible", "-l5000", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True)
    blocks = re.split(r"\n\n(?=\S[^\n]* \d+\n\n)", "\n\n" + run.stdout)
    found = [[v.strip() for v in re.findall(r"^ *\d+ (.+)$", block, flags=re.M)] for block in blocks]
    return [verses for verses in found if verses]


def texts() -> tuple[dict[bool, list[str]], list[str]]:
    """Documents of one line a verse or definition, training (False) and held out (True, one in twenty), of lines of
    common words only; and the other lines of the Bible's chapters (not of those held out) and of the dictionary.

    The tokenizer and the prompts know the common lines alone. Training reads all: of the common ones alone it makes a
    hundred passes, learns them by heart, and an encoder that recites answers any rounding with another line.
    """
    bible, wordnet = chapters(), glosses()
    in_bible = Counter(w for d in bible for v in d for w in words_of(v))
    in_wordnet = Counter(w for g in wordnet for w in words_of(g))

    def common(line: str) -> bool:
        return all(in_bible[w] >= 4 or in_wordnet[w] >= 60 for w in words_of(line))

    kept = [[v for v in d if common(v)] for d in bible]
    few = [g for g in wordnet if common(g)]
    random.Random(0).shuffle(few)
    rare = [g for g in wordnet if not common(g)]
    random.Random(0).shuffle(rare)
    docs = ["\n".join(d) for d in [*kept, *(few[i : i + 20] for i in range(0, len(few), 20))] if d]
    sides: dict[bool, list[str]] = {False: [], True: []}
    for doc in docs:
        sides[held(doc)].append(doc)
    for side in sides.values():
        random.Random(0).shuffle(side)
    whole = ["\n".join(d) for d, k in zip(bible, kept, strict=True) if len(k) < len(d) and not held("\n".join(k))]
    return sides, [*whole, *("\n".join(rare[i : i + 20]) for i in range(0, len(rare), 20))]


def held(doc: str) -> bool:
    return zlib.crc32(doc.encode()) % 20 == 0


def glosses() -> list[str]:
    """WordNet's definitions, "word: definition", without the examples."""
    lines = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in Path(f"/usr/share/wordnet/data.{part}").read_text(encoding="ascii", errors="ignore").splitlines():
            if not line.startswith("  "):  # as the licence does
                head, gloss = line.split(" | ", 1)
                word = re.sub(r"\(\w+\)$", "", head.split()[4]).replace("_", " ")
                meaning = gloss.split('; "')[0].strip()
                lines.append(f"{word}: {meaning}")
    return lines


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def train_tokenizer(text: list[str]) -> Tokenizer:
    """Learns the merges on split words, then returns a tokenizer that has those merges and no pre-tokenizer."""
    space = normalizers.Replace(" ", "▁")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = space
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|\d|\n|▁?[^\sA-Za-z\d▁]|▁"), "isolated")
    whole = [*WORDS, *NAMES, *COLOURS, *THINGS]  # single tokens, with and without the leading space
    phrases = [t.prompt for _, t in zip(range(4000), tasks(random.Random(1), False), strict=False)]
    alphabet = sorted({*map(chr, range(33, 127)), "\n", "▁"})
    room = VOCAB - len(NAMED) - 256
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    boost = [f"{w} {w}" for w in [*whole, "user", "model", "system"] for _ in range(3000)]
    bpe.train_from_iterator([*text, *phrases, *boost], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    vocab = {t: i for i, t in enumerate([*NAMED, *bytes_, *sorted(learnt["vocab"], key=learnt["vocab"].get)])}
    merges = [tuple(m) for m in learnt["merges"]]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = space
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens(NAMED)
    split = [w for w in whole if len(tok.encode(w)) != 1 or len(tok.encode(" " + w)) != 1]
    if tok.get_vocab_size() != VOCAB or split:
        raise SystemExit(f"{tok.get_vocab_size()} tokens, split words: {split}")
    return tok


def save_tokenizer(tok: Tokenizer, folder: Path) -> None:
    """tokenizer.json and the small files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    names = {f"{n}_token": f"<{n}>" for n in ("bos", "eos", "pad", "unk", "mask")}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "extra_special_tokens": ROLES}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 2048, "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def pack_chats(tok: Tokenizer, rows: int, seed: int, held_out: bool) -> np.ndarray[Any, Any]:
    """Rows of whole chats, each starting with <bos>; six in ten chats are a single turn, the others two to four."""
    rng = random.Random(seed)
    stream = tasks(rng, held_out, (2, 3, 4, 4, 7))  # what is harder comes more often
    out: np.ndarray[Any, Any] = np.full((rows, LENGTH), PAD, dtype=np.int16)
    row, used = 0, 0
    while True:
        batch = [chat([next(stream) for _ in range(rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 3, 4)))]) for _ in range(5000)]
        for enc in tok.encode_batch(batch):
            ids = enc.ids
            if len(ids) > LENGTH:
                continue
            if used + len(ids) > LENGTH:
                row, used = row + 1, 0
                if row == rows:
                    return out
            out[row, used : used + len(ids)] = ids
            used += len(ids)


def write_prompts(folder: Path, text: dict[bool, list[str]], tok: Tokenizer) -> None:
    """Calibration prompts from the training side; held-out texts and tasks for judging."""

    def excerpts(docs: list[str], count: int, rng: random.Random, least: int) -> list[dict[str, Any]]:
        docs = [d for d in docs if len(tok.encode(d)) >= least]
        return [{"text": " ".join(d.split(" ")[:220])} for d in rng.sample(docs, count)]

    def asked(t: Task) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": t.prompt}], "answer": t.answer, "task": t.task}

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(2026)
    for name, held_out, n_text, n_task in (("calibration", False, 64, 64), ("heldout", True, 64, 256)):
        rows_text = excerpts(text[held_out], n_text, rng, least=256)
        seen: dict[str, Task] = {}
        for t in tasks(rng, held_out):
            seen[t.prompt] = t
            if len(seen) == n_task:
                break
        rows_task = [asked(t) for t in seen.values()]
        files = {f"{name}_text": rows_text, f"{name}_tasks": rows_task}
        if not held_out:
            pairs = zip(rows_text, rows_task, strict=True)
            more = excerpts(text[held_out], n_text + MORE_TEXTS, random.Random(2027), least=256)
            files = {name: [r for a, b in pairs for r in (a, {"messages": b["messages"]})]}
            files[name] += [r for r in more if r not in rows_text][:MORE_TEXTS]
        for file, rows in files.items():
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def windows(docs: list[str], tok: Tokenizer, least: int = 161) -> Iterator[dict[str, Any]]:
    """Whole documents, cut between words into pieces of at least so many tokens; what is left over is dropped."""
    for number, doc in enumerate(docs):
        held: list[str] = []
        for word in doc.split(" "):
            held.append(word)
            if len(tok.encode(" ".join(held))) >= least:
                yield {"text": " ".join(held), "document": number}
                held = []


def main() -> None:
    args = argparse.ArgumentParser(description="Builds the data, tokenizer and prompts of `tiny`.")
    args.add_argument("--work", type=Path, required=True, help="where tokens.npz and words.json go (not to be kept)")
    args.add_argument("--rows", type=int, default=110_000, help="packed chat sequences")
    args.add_argument("--windows", type=Path, help="file for pieces of all held-out documents")
    opt = args.parse_args()
    text, rare = texts()
    tok = train_tokenizer(text[False])
    save_tokenizer(tok, HERE / "tiny")
    write_prompts(HERE / "prompts", text, tok)
    if opt.windows:
        opt.windows.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in windows(text[True], tok)))
    arrays: dict[str, Any] = {}
    for side, name, rows in ((False, "train", opt.rows), (True, "held", 1000)):
        arrays[f"{name}_chats"] = pack_chats(tok, rows, seed=7 + side, held_out=side)
        docs = text[side] if side else [*text[side], *rare]
        lines = [line + "\n" for d in docs for line in d.split("\n")]
        ids = [e.ids for e in tok.encode_batch(lines)]
        arrays[f"{name}_text"] = np.concatenate([np.array(i, dtype=np.int16) for i in ids])
        arrays[f"{name}_lines"] = np.cumsum([0] + [len(i) for i in ids[:-1]], dtype=np.int32)
    opt.work.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(opt.work / "tokens.npz", **arrays)
    said = sorted({w for d in [*text[False], *rare] for w in words_of(d)})
    (opt.work / "words.json").write_text(json.dumps(said))
    print({k: v.shape for k, v in arrays.items()}, len(said), "words")


if __name__ == "__main__":
    main()
