"""Checkpoints as trainers and exporters save them. Each opens with the same weights as the plain one, and says in a
notice what is odd about it; what is something else is named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from micro import micro_config, micro_tensors, two_steps, write_micro
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main
from dgq.convert.layerwise.samples import documents
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.source.models import is_artifact, open_model
from dgq.convert.validation.inputs import ValidateOptions, open_inputs
from dgq.convert.validation.questions import questions
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import BOM, read_json
from dgq.runtime.engine import batch
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.model.sampler import Stopper, temperature
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER
from dgq.runtime.shape.pictured import Pictured
from dgq.runtime.shape.settings import SamplerConfig
from dgq.runtime.shape.vision import causal_images

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
Tensors = dict[str, torch.Tensor]


def values(weights: Any) -> Tensors:
    return {name: weights[name].dequantize() for name in weights}


def checked(path: Path, tensors: Tensors, *words: str) -> Source:
    """The source, opened both ways, with these values; one of its notices has each word."""
    source, lines = open_source(str(path)), []
    opened = open_model(str(path), notice=lines.append)
    for weights in (source, opened.weights, open_artifact(path).weights):
        found = values(weights)
        assert found.keys() == source.text.keys()
        assert all(torch.equal(found[name], tensors[name].float()) for name in found)
    for word in words:
        for notices in (source.notices, lines, open_artifact(path).weights.remarks):
            assert any(word in line and "\n" not in line for line in notices), (word, notices)
    assert not is_artifact(str(path))
    return source


def edited(path: Path, change: Callable[[dict[str, Any]], None], file: str = "config.json") -> Path:
    raw = json.loads((path / file).read_text())
    change(raw)
    (path / file).write_text(json.dumps(raw))
    return path


def untold(path: Path) -> Path:
    """Without a chat template."""
    return edited(path, lambda raw: raw.pop("chat_template", None), "tokenizer_config.json")


def dgq(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refused(path: Path) -> str:
    """The one line that every way of opening a directory ends in."""
    lines = []
    for opened in (open_source, open_model, open_artifact):
        with pytest.raises(InputError) as error:
            opened(str(path))
        lines.append(str(error.value))
    assert "\n" not in lines[0] and len(set(lines)) == 1, lines
    return lines[0]


def nemo(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """NeMo AutoModel's export of a model, and the plain checkpoint with the same values."""
    plain = {name: tensor.float() for name, tensor in tensors.items()}
    for name in tensors:
        if name.endswith("per_expert_scale"):
            plain[name.replace("router.per_expert_scale", "experts.down_proj")] *= plain[name][:, None, None]
            plain[name] = torch.ones_like(plain[name])
        if name.startswith(ENCODER):
            plain[name] = plain[DECODER + name.removeprefix(ENCODER)].clone()
    return {name: tensor for name, tensor in plain.items() if not name.startswith("model.encoder.")}, plain


def test_nemo(tmp_path: Path) -> None:
    export, plain = nemo(micro_tensors(micro_config()))
    path = write_micro(tmp_path / "nemo", tensors=export)
    source = checked(path, plain, "the decoder's are taken for the encoder")
    other = open_source(str(write_micro(tmp_path / "plain", tensors=plain)))
    assert torch.equal(two_steps(source, source.config), two_steps(other, other.config))
    del export[DECODER + "layers.0.layer_scalar"]
    with pytest.raises(InputError, match="layer_scalar is missing"):  # damaged, not NeMo's
        open_source(str(write_micro(tmp_path / "damaged", tensors=export)))


def test_some_encoder_scalars_are_no_export(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    del tensors[ENCODER + "layers.0.layer_scalar"]
    with pytest.raises(InputError, match="layer_scalar is missing"):
        open_source(str(write_micro(tmp_path / "micro", tensors=tensors)))


def towerless(path: Path) -> Path:
    """`tiny` as NeMo exports it: the config has a vision_config, and the files no tower."""
    shutil.copytree(TINY, path)
    export, _ = nemo(load_file(TINY / "model.safetensors"))
    save_file(export, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_towerless(tmp_path: Path) -> None:
    path = towerless(tmp_path / "nemo")
    source = checked(path, nemo(load_file(TINY / "model.safetensors"))[1], "no vision tower: text only")
    assert not source.vision
    for opened in (open_model(str(path)), open_artifact(path)):
        with pytest.raises(InputError, match="has no vision tower, which images need"):
            _ = opened.vision


@pytest.mark.parametrize(("to", "recipe"), [("gguf", "q8_0")])
def test_towerless_becomes_a_text_model(tmp_path: Path, to: str, recipe: str, few_steps: None) -> None:
    path = edited(towerless(tmp_path / "nemo"), lambda raw: raw.update(quantization_config={}))
    out = tmp_path / to
    dgq("convert", path, "--to", to, "--recipe", recipe, "-o", out, "--effort", "fast", "--device", "cpu")
    config = json.loads((out / "config.json").read_text())
    assert "vision_config" not in config and config.get("quantization_config") != {}
    notices = json.loads((out / "dgq.json").read_text())["notices"]
    assert sum("text only" in line or "taken for the encoder" in line or "stale" in line for line in notices) == 3
    assert not list(out.glob("*mmproj*"))
    assert open_model(str(out)).weights[EMBEDDING].shape == (2048, 256)


STALE: dict[str, Any] = {
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb_off": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "mlx": {"group_size": 64, "bits": 4},
    "empty": {},
}


@pytest.mark.parametrize("kind", [*STALE, "hf_quant_config"])
def test_stale_declaration(tmp_path: Path, kind: str) -> None:
    tensors = micro_tensors(micro_config())
    path = write_micro(tmp_path / "micro", tensors=tensors)
    if kind == "hf_quant_config":
        (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    else:
        edited(path, lambda raw: raw.update(quantization_config=STALE[kind]))
    source = checked(path, tensors, "every tensor is plain: stale")
    assert "quantization_config" not in (source.plain_config() or {})


def test_a_quantised_checkpoint_is_refused_as_before(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    tensors[DECODER + "layers.0.mlp.up_proj.weight"] = torch.zeros(160, 32, dtype=torch.uint8)
    path = write_micro(tmp_path / "micro", tensors=tensors)
    edited(path, lambda raw: raw.update(quantization_config=STALE["modelopt"]))
    with pytest.raises(InputError, match=r"already quantised \('modelopt'\)"):
        open_source(str(path))
    assert is_artifact(str(path))


# --- the sampler's settings, small files ---------------------------------------------------------------------------


def test_sampler_settings(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    path = write_micro(tmp_path / "micro", tensors=tensors)
    odd = {"confidence_threshold": 0, "t_min": 0, "max_new_tokens": None}
    edited(path, lambda raw: raw.update(odd), "generation_config.json")
    generation = open_source(str(path)).generation
    assert (generation.sampler.confidence, generation.sampler.t_min, generation.max_new_tokens) == (0.0, 0.0, 256)
    stopper = Stopper(generation.sampler)
    argmax, entropy = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16)
    assert not any(bool(stopper.done(argmax, entropy)) for _ in range(9))  # vLLM: mean entropy < 0 never holds
    steps = generation.sampler.steps
    assert float(temperature(1, generation.sampler, "cpu")) == pytest.approx(generation.sampler.t_max / steps)
    lines: list[str] = []
    assert "confidence_threshold is 0: no early stop" in open_model(str(path), notice=lines.append).remarks[0]
    assert lines == [line for line in open_source(str(path)).notices if "threshold" in line]
    (path / "generation_config.json").unlink()
    assert open_source(str(path)).generation.sampler == SamplerConfig()
    assert "no generation_config.json: the released model's sampler is used, 48 steps" in open_artifact(path).remarks[0]


def test_small_files(tmp_path: Path) -> None:
    """A BOM before JSON, torch_dtype for dtype, the chat template in tokenizer_config.json, folders and a second
    container beside the shards."""
    config = micro_config()
    tensors = micro_tensors(config)
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    path = write_micro(tmp_path / "micro", config, tensors)
    plain = Tokenizer.from_dir(untold(path))
    edited(path, lambda raw: raw.update(chat_template="{{ messages[0].content }}"), "tokenizer_config.json")
    for file in path.glob("*.json"):
        file.write_bytes(BOM + file.read_bytes())
    for folder in ("original", ".cache/huggingface"):
        (path / folder).mkdir(parents=True)
    save_file({"tok_embeddings.weight": torch.ones(2)}, path / "consolidated.safetensors")
    checked(path, tensors)
    assert [line.split(": ")[1].split(",")[0] for line in open_source(str(path)).notices] == [
        "begins with a byte order mark"
    ]
    tokenizer = open_model(str(path)).tokenizer
    assert tokenizer.encode("a b") == plain.encode("a b")
    assert tokenizer.render([{"role": "user", "content": "hi"}]) == "hi" and tokenizer.chats and not plain.chats


@pytest.mark.parametrize("to", ["nvfp4", "gguf"])
def test_boms_are_not_passed_on(tmp_path: Path, to: str) -> None:
    path = write_micro(tmp_path / "micro")
    for file in path.glob("*.json"):
        file.write_bytes(BOM + file.read_bytes())
    dgq("convert", path, "--to", to, "-o", tmp_path / "out", "--effort", "fast", "--device", "cpu")
    assert not any(file.read_bytes().startswith(BOM) for file in (tmp_path / "out").iterdir())
    assert open_model(str(tmp_path / "out")).tokenizer.encode("a b") == open_model(str(path)).tokenizer.encode("a b")


def test_no_chat_template(tmp_path: Path) -> None:
    """Validation asks for texts only, and samples are taken from texts."""
    path = untold(write_micro(tmp_path / "micro"))
    opened = open_model(str(path))
    asked, _ = questions(opened, str(path), None, 8)
    assert asked and {question.group for question in asked} == {"text"}
    lines: list[str] = []
    options = ValidateOptions(against=str(path), reference=tmp_path / "reference", device="cpu", quick=True)
    open_inputs([], options, options.settings(), lines.append)
    assert any("has no chat template: judged on texts alone" in line for line in lines)
    read, _ = documents(open_source(str(path)), None)
    assert read and not any(document.chat for document in read)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "hi"}')
    with pytest.raises(InputError, match="has no chat template"):
        questions(opened, str(path), tmp_path / "mine.jsonl", 8)


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "config.json"])
def test_lfs_pointer(tmp_path: Path, file: str) -> None:
    path = write_micro(tmp_path / "micro")
    (path / file).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234567\n")
    assert f"{path / file}: is git-LFS's pointer to the file" in refused(path)
    (path / "tokenizer.json").write_text((path / file).read_text())
    with pytest.raises(InputError, match=r"tokenizer\.json: is git-LFS's pointer"):
        Tokenizer.from_dir(path)


# --- names ---------------------------------------------------------------------------------------------------------


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def accelerates(tensors: Tensors) -> Tensors:
    """Accelerator.save_model() keeps one name of each tied weight, the encoder's."""
    alone = ("layer_scalar", "self_conditioning")  # the decoder's own
    kept = {name for name in tensors if any(word in name for word in alone)}
    return {name if name in kept else name.replace(DECODER, ENCODER): tensor for name, tensor in tensors.items()}


def headed(tensors: Tensors) -> Tensors:
    return {"lm_head.weight" if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


def compiled(tensors: Tensors) -> Tensors:
    return {name.replace("mlp.", "_orig_mod.mlp._checkpoint_wrapped_module."): t for name, t in tensors.items()}


def buffered(tensors: Tensors) -> Tensors:
    """A state_dict() of named_buffers() too."""
    more = {"model.decoder.rotary_emb.full_attention_inv_freq": torch.ones(8),
            "model.encoder.language_model.rotary_emb.sliding_attention_original_inv_freq": torch.ones(8),
            "model.decoder.embed_tokens.embed_scale": torch.tensor(8.0)}  # fmt: skip
    return tensors | more


NAMES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "compile": (prefixed("_orig_mod."), "another program's names"),
    "ddp": (prefixed("module."), "another program's names"),
    "peft": (prefixed("base_model.model."), "another program's names"),
    "ddp of compile": (prefixed("module._orig_mod."), "another program's names"),
    "inner model": (
        lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()},
        "another program's names",
    ),
    "parts compiled": (compiled, "another program's names"),
    "accelerate": (accelerates, "tied weights are saved under their other name"),
    "save_model": (headed, "tied weights are saved under their other name"),
    "ddp of accelerate": (lambda tensors: prefixed("module.")(accelerates(tensors)), "tied weights are saved"),
    "buffers": (buffered, "3 saved buffers"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("shards", [0, 2])
def test_names(tmp_path: Path, kind: str, shards: int) -> None:
    tensors, (change, word) = micro_tensors(micro_config()), NAMES[kind]
    path = write_micro(tmp_path / "micro", tensors=change(tensors), shards=shards)
    source = checked(path, tensors, word)
    assert torch.equal(source.row(EMBEDDING, 3), tensors[EMBEDDING][3])


def test_an_index_may_list_the_head(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    path = write_micro(tmp_path / "micro", tensors=tensors)
    index = "model.safetensors.index.json"
    shard = "model-00001-of-00002.safetensors"
    edited(path, lambda raw: raw["weight_map"].update({"lm_head.weight": shard}), index)
    checked(path, tensors)
    edited(path, lambda raw: raw["weight_map"].update({"model.decoder.other": shard}), index)
    assert "that file does not hold it" in refused(path)


def test_unknown_tensors_are_refused_as_before(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    for name in ("module.model.decoder.other.weight", "base_model.model." + DECODER + "norm.weight", "x.lora_A.weight"):
        more = tensors | {name: torch.ones(64).bfloat16()}
        assert f"tensor {name} is not part of the model" in refused(write_micro(tmp_path / name, tensors=more))


# --- folders that are something else -------------------------------------------------------------------------------

FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "lora": (("adapter_config.json", "adapter_model.safetensors", "README.md"), "with --adapter"),
    "zero": (("global_step9/x_optim_states.pt", "zero_to_fp32.py", "config.json"), "zero_to_fp32.py"),
    "fsdp": (("pytorch_model_fsdp_0/__0_0.distcp",), "accelerate merge-weights"),
    "trainer": (("checkpoint-500/model.safetensors", "training_args.bin"), "name the folder below it that does, check"),
    "nemo": (("consolidated/model.safetensors.index.json",), "name the folder below it that does, consolidated/"),
    "bin": (("config.json", "pytorch_model-00001-of-00002.bin"), "save them as safetensors"),
    "pt": (("config.json", "model.pt"), "save them as safetensors"),
    "onnx": (("config.json", "onnx/model.onnx"), "ONNX export"),
    "tf": (("config.json", "tf_model.h5"), "TensorFlow"),
    "openvino": (("config.json", "openvino_model.xml", "x.bin"), "OpenVINO"),
    "no index": (("config.json", "model-00001-of-00002.safetensors"), "fetch that file too"),
    "variant": (("config.json", "model.bf16.safetensors"), "a variant, and no model.safetensors"),
    "mistral": (("params.json", "consolidated.safetensors"), "consolidated.safetensors alone"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path: Path, kind: str) -> None:
    files, words = FOLDERS[kind]
    for file in files:
        (tmp_path / kind / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / kind / file).write_text("{}")
    assert words in refused(tmp_path / kind)


def test_mlx(tmp_path: Path) -> None:
    """mlx_lm's layout: codes U32, scales and biases beside them. Its unquantised conversion opens."""
    tensors = micro_tensors(micro_config())
    checked(write_micro(tmp_path / "plain", tensors=tensors), tensors)
    name = DECODER + "layers.0.mlp.up_proj."
    tensors[name + "weight"] = torch.zeros(160, 8, dtype=torch.uint32)
    tensors |= {name + "scales": torch.ones(160, 1).bfloat16(), name + "biases": torch.ones(160, 1).bfloat16()}
    path = write_micro(tmp_path / "mlx", tensors=tensors)
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    for keys in (("quantization",), ("quantization", "quantization_config"), ("quantization_config",)):
        config = micro_config() | dict.fromkeys(keys, settings)
        (path / "config.json").write_text(json.dumps(config))
        assert "quantised by MLX (4 bits, groups of 64)" in refused(path)


# --- images without use_bidirectional_attention --------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["vision", None])
def test_images_see_what_transformers_lets_them_see(tmp_path: Path, attention: str | None) -> None:
    """null means causal images: the logits behind an image are transformers', not those of "vision"."""
    path = tmp_path / "tiny"
    shutil.copytree(TINY, path)
    edited(path, lambda raw: raw["text_config"].update(use_bidirectional_attention=attention))
    opened = open_model(str(path))
    image = opened.vision.tokens.image
    embeddings = torch.randn(12, opened.config.hidden, generator=torch.Generator().manual_seed(0))
    is_causal = causal_images(read_json(path / "config.json"), "config.json")
    prompt = Pictured([2, 13, *[image] * 12, 15, 20, 21], embeddings, image, is_causal)
    model = opened.load("cpu", torch.float32)
    canvas = torch.randint(0, opened.config.vocab, (1, 64), generator=torch.Generator().manual_seed(1))
    ours = model.decode(canvas, batch.encode_each(model, [prompt], len(prompt) + 64))
    torch.testing.assert_close(ours, theirs(path, prompt, canvas), atol=1e-4, rtol=0)


def theirs(path: Path, prompt: Pictured, canvas: torch.Tensor) -> torch.Tensor:
    """transformers' logits of the canvas behind the prompt, whose image tokens have these embeddings."""
    from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

    oracle = DiffusionGemmaForBlockDiffusion.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    encoder, length = oracle.model.encoder, len(prompt)
    kinds = torch.tensor([[int(one) for one in prompt.is_image]])
    cache = DynamicCache(config=oracle.config.get_text_config())
    places = torch.arange(length)[None]
    with torch.no_grad():
        embedded = encoder.get_input_embeddings()(torch.tensor([list(prompt)]))
        embedded[kinds == 1] = prompt.embeddings
        masks = encoder.create_masks_for_generate(
            config=oracle.config, inputs_embeds=embedded, attention_mask=torch.ones(1, length, dtype=torch.bool),
            past_key_values=cache, position_ids=places, mm_token_type_ids=kinds,
        )  # fmt: skip
        encoder.language_model(inputs_embeds=embedded, attention_mask=masks, past_key_values=cache, position_ids=places)
        step = {"decoder_input_ids": canvas, "past_key_values": cache}
        logits: torch.Tensor = oracle(**step, decoder_position_ids=torch.arange(length, length + 64)[None]).logits
    return logits


def test_false_is_for_texts(tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    shutil.copytree(TINY, path)
    edited(path, lambda raw: raw["text_config"].update(use_bidirectional_attention=False))
    opened = open_model(str(path))
    assert opened.weights[EMBEDDING].shape == (2048, 256)
    with pytest.raises(InputError, match="use_bidirectional_attention is false, which says nothing of images"):
        _ = opened.vision
