"""Adapters that peft made, merged as the weights are read, against peft's own merge_and_unload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from commands import error_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DiffusionGemmaForBlockDiffusion

from dgq.convert.cli.__main__ import main
from dgq.convert.source.adapter import AdapterChoice
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.validation.reference import read_reference
from dgq.runtime.shape.names import DECODER, ENCODER

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
LAYER = r"model\.decoder\.(layers\.\d+\.(self_attn|mlp|router)|self_conditioning)\..*proj"
EXPERTS = ["decoder.layers.0.experts.gate_up_proj", "decoder.layers.0.experts.down_proj",
           "decoder.layers.3.experts.down_proj"]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": LAYER},
    "patterns": {
        "r": 4, "lora_alpha": 3, "target_modules": LAYER, "use_rslora": True, "target_parameters": EXPERTS,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 6, r"experts\.down_proj": 3},
        "alpha_pattern": {"experts.gate_up_proj": 16, "mlp.down_proj": 1},
    },
    "dora": {"r": 3, "lora_alpha": 6, "target_modules": LAYER, "use_dora": True},
    "experts": {"r": 2, "lora_alpha": 8, "target_modules": [], "target_parameters": EXPERTS},
}  # fmt: skip


SIDE = ("--adapter-side", "decoder")


def merged_source(*paths: Path, side: Any = "decoder") -> Source:
    """These adapters are of the decoder's side; what is merged into both is a choice."""
    return open_source(str(TINY_A), adapters=[AdapterChoice(path, side) for path in paths])


def fresh() -> Any:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(TINY_A, dtype=torch.float32)


def trained(model: Any, seed: int) -> None:
    """As training leaves them: no number zero, and changes about as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else noise * 0.1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Of each kind: its directory, and what peft makes of the model with it, in float32."""
    found = {}
    for seed, (kind, settings) in enumerate(KINDS.items()):
        path = tmp_path_factory.mktemp("adapter") / kind
        wrapped = get_peft_model(fresh(), LoraConfig(**settings))
        trained(wrapped, seed)
        wrapped.save_pretrained(path)
        found[kind] = path, wrapped.merge_and_unload().state_dict()
    return found


def changed(source: Source, merged: dict[str, torch.Tensor]) -> Iterator[str]:
    """Weights that the adapter changes; every one is peft's, rounded to BF16 once."""
    plain = open_source(str(TINY_A))
    for name in source:
        ours, peft_s = source[name].parts[""], merged[name]
        assert ours.dtype == torch.bfloat16 and ours.shape == peft_s.shape
        half = torch.finfo(torch.bfloat16).eps / 2
        assert bool(((ours.float() - peft_s).abs() <= half * peft_s.abs() + 1e-6).all()), name
        if not torch.equal(ours, plain[name].parts[""]):
            yield name


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges(made: dict[str, Any], kind: str) -> None:
    path, merged = made[kind]
    source = merged_source(path)
    names = set(changed(source, merged))
    assert names == source.adapters[0].parts.keys() and names
    assert {DECODER + "layers.0.experts.down_proj", DECODER + "layers.0.experts.gate_up_proj"} <= names or kind in (
        "plain",
        "dora",
    )
    assert (
        kind == "experts"
        or {
            DECODER + "layers.0.self_attn.q_proj.weight",
            DECODER + "self_conditioning.down_proj.weight",
            DECODER + "layers.5.mlp.gate_proj.weight",
        }
        <= names
    )
    for name in names:  # whatever is read of it at once
        whole = source[name].parts[""]
        rows = torch.cat([source.rows(name, i, min(i + 5, len(whole))) for i in range(0, len(whole), 5)])
        assert torch.equal(rows, whole)
    assert source.notices[-1].startswith(f"adapter {kind}: merged into {len(names)} weights; trained on the decoder")


def test_against_a_merge_in_bfloat16(made: dict[str, Any]) -> None:
    """Which rounds the change, and then the sum."""
    path, _ = made["patterns"]
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(TINY_A, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, path).merge_and_unload().state_dict()
    source = merged_source(path)
    for name in source.adapters[0].parts:
        ours, theirs = source[name].parts[""].float(), merged[name].float()
        change = (theirs - open_source(str(TINY_A))[name].parts[""].float()).abs()
        eps = torch.finfo(torch.bfloat16).eps
        assert bool(((ours - theirs).abs() <= eps * (theirs.abs() + change)).all())


@pytest.mark.parametrize("kinds", [("plain", "experts"), ("patterns", "dora")], ids=["apart", "on the same weights"])
def test_two_adapters_one_after_the_other(made: dict[str, Any], kinds: tuple[str, str]) -> None:
    paths = [made[kind][0] for kind in kinds]
    wrapped = PeftModel.from_pretrained(fresh(), paths[0], adapter_name="one").merge_and_unload()
    merged = PeftModel.from_pretrained(wrapped, paths[1], adapter_name="two").merge_and_unload().state_dict()
    source = merged_source(*paths)
    assert set(changed(source, merged)) == {name for adapter in source.adapters for name in adapter.parts}


def test_experts_the_other_way_round(made: dict[str, Any], tmp_path: Path) -> None:
    """As peft before 0.18 saved them: in and out exchanged. What the change is transposed from is peft's own."""
    path, merged = made["experts"]
    shutil.copytree(path, tmp_path / "old")
    tensors, experts = load_file(path / "adapter_model.safetensors"), 12
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        tensors[name] = b.view(len(b), -1, experts).permute(2, 1, 0).reshape(-1, len(b)).contiguous()
        tensors[other] = a.view(experts, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    assert set(changed(merged_source(tmp_path / "old"), merged)) == {"model." + name for name in EXPERTS}


def test_adapters_of_parts_of_the_model(tmp_path: Path) -> None:
    """peft was given the decoder, or the encoder's language model: both share what is changed."""
    for part, says in (("model.decoder", "decoder"), ("model.encoder.language_model", "encoder")):
        model = fresh()
        wrapped = get_peft_model(model.get_submodule(part), LoraConfig(r=2, target_modules=["o_proj", "up_proj"]))
        trained(wrapped, 7)
        wrapped.save_pretrained(tmp_path / says)
        wrapped.merge_and_unload()
        source = merged_source(tmp_path / says, side=says)
        assert len(list(changed(source, model.state_dict()))) >= 12
        assert source.adapters[0].adapter.sides == (says,)


def test_sides_that_differ_need_a_choice(tmp_path: Path) -> None:
    """convert asks for a side; the mean is that of what peft makes of each side. The same numbers need no choice."""
    wrapped = get_peft_model(fresh(), LoraConfig(r=2, target_modules=r"model\.(decoder|encoder\.language).*\.o_proj"))
    trained(wrapped, 3)
    wrapped.save_pretrained(tmp_path / "two")
    ask = ("convert", str(TINY_A), "--to", "gguf", "-o", str(tmp_path / "o"), "--adapter", str(tmp_path / "two"))
    said = error_of(*ask)
    assert all(word in said for word in ("trained apart", "dgq run ARTIFACT --adapter", "--adapter-side", "o_proj"))
    plain = open_source(str(TINY_A))
    with torch.no_grad():
        for side in ("decoder", "encoder", "mean"):
            source = merged_source(tmp_path / "two", side=side)
            for number in range(6):
                name = f"layers.{number}.self_attn.o_proj"
                both = [
                    wrapped.get_submodule("base_model.model." + part + name).get_delta_weight("default")
                    for part in (DECODER, ENCODER)
                ]
                change = sum(both) / 2 if side == "mean" else both[side == "encoder"]
                weight = DECODER + name + ".weight"
                right = (plain[weight].parts[""].float() + change).bfloat16().float()
                ours = source[weight].parts[""].float()
                assert bool(((ours - right).abs() <= torch.finfo(torch.bfloat16).eps * right.abs()).all())
    file = tmp_path / "two" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ENCODER in name]:
        tensors[name] = tensors[name.replace(ENCODER, DECODER)].clone()
    save_file(tensors, file)
    (merged,) = open_source(str(TINY_A), adapters=[tmp_path / "two"]).adapters
    assert len(merged.parts) == 6 and merged.adapter.sides == ("encoder", "decoder") and not merged.adapter.apart


@pytest.mark.usefixtures("no_pictures")
def test_converted_run_and_verified(made: dict[str, Any], tmp_path: Path) -> None:
    """The artifact is that of the merged checkpoint, says what it was merged with, and is verified with it alone."""
    paths = made["patterns"][0], made["plain"][0]
    merged = tmp_path / "tinyA"
    shutil.copytree(TINY_A, merged, ignore=shutil.ignore_patterns("*.gguf", "logits*"))
    source = merged_source(paths[0])
    tensors = {name: source[name].parts[""] for name in (*source.text, *source.vision)}
    save_file(tensors, merged / "model.safetensors")

    def dgq(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout

    nvfp4 = ("--to", "nvfp4", "--recipe", "nvfp4-w4a16", "-o")
    dgq("convert", TINY_A, "--to", "gguf", "-o", tmp_path / "gguf", "--adapter", paths[0], *SIDE)
    dgq("convert", TINY_A, *nvfp4, tmp_path / "nvfp4", "--adapter", paths[0], *SIDE)
    dgq("convert", merged, *nvfp4, tmp_path / "same")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("nvfp4", "same")]
    assert files[0] == files[1]
    document = json.loads((tmp_path / "nvfp4" / "dgq.json").read_text())
    assert [one["name"] for one in document["adapters"]] == ["patterns"] and len(document["adapters"][0]["files"]) == 2
    assert document["adapters"][0]["side"] == "decoder"
    assert any("adapter patterns: merged" in notice for notice in document["notices"])
    assert json.loads(dgq("inspect", tmp_path / "gguf", "--json"))["provenance"]["adapters"] == ["patterns"]
    assert "adapters patterns, merged in" in dgq("inspect", tmp_path / "gguf")
    card = json.loads(dgq("publish", tmp_path / "gguf", "--repo", "a/b", "--dry-run", "--force", "--json"))
    text = card["repositories"][0]["card"]
    assert (
        "| LoRA adapter merged in | `patterns` |" in text
        and "--seed SEED --adapter patterns --adapter-side decoder\n" in text
    )
    assert all(said["sha256"] in text for said in document["adapters"][0]["files"].values())
    verify = ("verify", tmp_path / "gguf", "--against", TINY_A, "--sample", 200)
    dgq(*verify, "--adapter", paths[0], *SIDE)
    for given, problem in (
        ((), "made with --adapter patterns --adapter-side decoder"),
        (("--adapter", str(paths[1]), *SIDE), "not those"),
        (("--adapter", str(paths[0]), "--adapter-side", "mean"), "not those"),
    ):
        assert problem in error_of(*map(str, verify), *given)
    planned = json.loads(dgq("plan", TINY_A, "--to", "gguf", "--no-probe", "--adapter", paths[0], *SIDE, "--json"))
    assert any(notice.startswith("adapter patterns: merged") for notice in planned["notices"])
    (tmp_path / "asked.jsonl").write_text('{"prompt": "the", "answer": "a"}\n')
    asked = ("--quick", "--prompts", tmp_path / "asked.jsonl", "--reference", tmp_path / "reference")
    dgq("validate", "--against", TINY_A, "--adapter", paths[0], *asked)
    about = read_reference(tmp_path / "reference").about
    assert about["weights"] == open_source(str(TINY_A)).digest()  # the adapter stays beside the weights
    assert [one["name"] for one in about["adapters"]] == ["patterns"] and about["name"] == f"{TINY_A} with patterns"
    again = ("validate", str(tmp_path / "gguf"), "--reference", str(tmp_path / "reference"), "-o", str(tmp_path / "r"))
    assert "made with other adapters" in error_of(*again, "--against", str(TINY_A))
    remark = "made with --adapter patterns, which was not given"
    for number, (given, warned) in enumerate(
        {("--against", TINY_A): True, ("--reference", tmp_path / "reference"): False}.items()
    ):
        asks = ("--quick", "--prompts", tmp_path / "asked.jsonl", *given) if warned else given
        report = tmp_path / f"report{number}"
        done = CliRunner().invoke(main, list(map(str, ("validate", tmp_path / "gguf", "-o", report, *asks))))
        assert done.exit_code in (0, 1), done.output  # a gate is none of this test's business
        (judged,) = json.loads((report / "report.json").read_text())["artifacts"]
        assert any(line.startswith(remark) for line in judged["remarks"]) == warned
        assert (remark in (report / "report.html").read_text()) == warned == (remark in " ".join(done.output.split()))
    assert "needs --against" in error_of(*again, "--adapter", str(paths[0]))


def test_what_is_not_merged_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    good = made["plain"][0]

    def refused(tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> str:
        path = tmp_path / "bad"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
        config = json.loads((path / "adapter_config.json").read_text()) | settings
        (path / "adapter_config.json").write_text(json.dumps(config))
        if tensors is not None:
            save_file(tensors, path / "adapter_model.safetensors")
        return error_of("run", str(TINY_A), "x", "--adapter", str(path))

    for key, value in (
        ("peft_type", "IA3"), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("lora_bias", True), ("r", 0),
        ("lora_alpha", "8"), ("init_lora_weights", "pissa"), ("fan_in_fan_out", True), ("use_qalora", True),
        ("rank_pattern", {"q_proj": 0}), ("layer_replication", [[0, 1]]), ("trainable_token_indices", [1]),
    ):  # fmt: skip
        assert key in refused(**{key: value})
    assert "no regular expression" in refused(rank_pattern={"(": 2})
    assert "has rank 4" in refused(r=5) and "DoRA" in refused(use_dora=True)
    tensors = load_file(good / "adapter_model.safetensors")
    a = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    b = a.replace("lora_A", "lora_B")
    assert "lacks lora_A or lora_B" in refused({a: tensors[a]})
    assert "fit no weight" in refused(tensors | {a: tensors[a][:, :-1].contiguous()})
    assert "not finite" in refused(tensors | {a: tensors[a] / 0})
    assert "no tensor of a LoRA layer" in refused(tensors | {a.replace("lora_A", "lora_C"): tensors[a].clone()})
    moved = {name.replace("layers.0.", "layers.99."): tensor for name, tensor in tensors.items()}
    assert "layers.99" in refused(moved)
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.zeros(shape) for part, shape in
            (("A", (4, 256)), ("B", (512, 4)))}  # fmt: skip
    assert "lm_head" in refused(tensors | head)
    table = {name.replace("lm_head", "model.decoder.embed_tokens"): tensor for name, tensor in head.items()}
    assert "embedding" in refused(table)
    assert "no such file" in error_of("run", str(TINY_A), "x", "--adapter", str(tmp_path / "nothing"))
    (tmp_path / "bad" / "adapter_model.safetensors").unlink()
    assert "safetensors" in error_of("run", str(TINY_A), "x", "--adapter", str(tmp_path / "bad"))
    assert b in tensors and peft.__version__
