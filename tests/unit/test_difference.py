"""`--base`: what a fine-tune changed of its base, by arithmetic, and when experts that did not change are a warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from micro import micro_config, micro_tensors, write_micro
from test_exports import APART
from test_strangers import Tensors, dgq

from dgq.convert.cli.terminal.difference_page import ranges
from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.difference import Difference, difference
from dgq.convert.verification.inspect import inspect
from dgq.quant.errors import InputError
from dgq.runtime.shape.names import DECODER

TRAINED = {"peft_type": "LORA", "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}


def changed(tensors: Tensors, *words: str) -> Tensors:
    """Weights whose name holds one of the words, 1 and a quarter times as large, which bfloat16 rounds."""
    return {
        name: (tensor.float() * 1.25).bfloat16() if any(word in name for word in words) else tensor
        for name, tensor in tensors.items()
    }


def compared(path: Path, tuned: Tensors, notes: dict[str, object] | None = None) -> Difference:
    base = write_micro(path / "base", tensors=micro_tensors(micro_config()))
    other = write_micro(path / "tuned", tensors=tuned, shards=0)
    if notes is not None:
        (other / "adapter_config.json").write_text(json.dumps(notes))
    return difference(open_source(str(other)), open_source(str(base)))


def test_numbers(tmp_path: Path) -> None:
    """Relative changes are the norms' ratio; of a fused weight the experts that differ are counted."""
    base = micro_tensors(micro_config())
    tuned = changed(base, "layers.1.self_attn.q_proj")
    name = DECODER + "layers.0.experts.down_proj"
    tuned[name] = base[name].clone()
    tuned[name][2] *= 3
    found = compared(tmp_path, tuned)
    query = DECODER + "layers.1.self_attn.q_proj.weight"
    assert found.changes.keys() == {query, name} and (found.changes[name].experts, found.changes[name].layer) == (1, 0)
    for one in (query, name):
        delta, whole = tuned[one].double() - base[one].double(), base[one].double()
        assert found.changes[one].relative == pytest.approx(float(delta.norm() / whole.norm()), rel=1e-5)
    rows = found.by_part()
    assert (rows["attention"]["changed"], rows["attention"]["layers"], rows["attention"]["weights"]) == (1, [1], 7)
    assert rows["dense MLP"]["changed"] == 0 and rows["routed experts"]["weights"] == 4
    assert sum(row["weights"] for row in rows.values()) == len(base)


def test_pieces_and_dtypes_are_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers in float32, experts apart, some rows at a time."""
    monkeypatch.setattr("dgq.convert.source.difference.PIECE", 1000)
    base = micro_tensors(micro_config())
    wide = APART["vLLM"]({name: tensor.float() for name, tensor in base.items()})
    assert not compared(tmp_path, wide).changes
    wide[DECODER + "layers.1.moe.experts.3.up_proj.weight"][95, 63] += 1
    found = compared(tmp_path / "odd", wide)
    assert list(found.changes) == [DECODER + "layers.1.experts.gate_up_proj"]


WARN: dict[str, tuple[Callable[[Tensors], Tensors], bool, str]] = {
    "attention alone": (lambda t: changed(t, "self_attn.q_proj"), False, ""),
    "attention, experts claimed": (lambda t: changed(t, "self_attn.q_proj"), True, "adapter_config.json (target_p"),
    "dense MLPs of all layers": (lambda t: changed(t, ".mlp.", "self_attn"), False, "attention and dense MLP changed"),
    "dense MLP of one layer": (lambda t: changed(t, "layers.1.mlp."), False, ""),
    "one expert weight": (
        lambda t: changed(t, "layers.0.experts.down", "self_attn"),
        False,
        "and 1 are not: did a mer",
    ),
    "everything": (lambda t: changed(t, "layers."), True, ""),
    "the last layer": (lambda t: changed(t, "layers.1."), True, ""),
    "nothing": (dict, False, ""),
}


@pytest.mark.parametrize("kind", WARN)
def test_warnings(tmp_path: Path, kind: str) -> None:
    change, claimed, word = WARN[kind]
    found = compared(tmp_path, change(micro_tensors(micro_config())), TRAINED if claimed else None)
    assert len(found.warnings) == bool(word)
    assert all(word in line and "unsloth-zoo 779" in line for line in found.warnings)


def test_pages(tmp_path: Path) -> None:
    """inspect and plan show the table, the layers and the warning; --json has the same under "difference"."""
    compared(tmp_path, changed(micro_tensors(micro_config()), "layers.0.self_attn.q_proj"), TRAINED)
    both = (tmp_path / "tuned", "--base", tmp_path / "base")
    for page in (dgq("inspect", *both), dgq("plan", *both, "--to", "gguf", "--no-probe")):
        assert "1 of 51 weights differ" in page and "warning: 4 of 4 expert weights are the base's" in page
        assert "0      self_attn.q_proj 2.5e-01" in page
    said = json.loads(dgq("inspect", *both, "--json").splitlines()[-1])["difference"]
    plan = json.loads(dgq("plan", *both, "--json").splitlines()[-1])["difference"]
    assert said == plan and said["by_part"]["attention"]["changed"] == 1 and len(said["warnings"]) == 1
    assert [ranges([0, 1, 2, 5, 7, 8]), ranges([])] == ["0-2, 5, 7-8", ""]


def test_models_of_other_shapes(tmp_path: Path) -> None:
    """A pruned model is compared where it can be, and told where not."""
    config = micro_config()
    config["text_config"]["num_experts"] = 3
    base = write_micro(tmp_path / "base")
    tuned = write_micro(tmp_path / "tuned", config, micro_tensors(config))
    found = difference(open_source(str(tuned)), open_source(str(base)))
    assert len(found.reshaped) == 8 and not found.warnings and not found.only_here
    assert "8 weights of another shape than the base's: model.decoder.layers.0." in dgq(
        "inspect", tuned, "--base", base
    )


def test_what_has_no_base(tmp_path: Path) -> None:
    base = write_micro(tmp_path / "base")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="is no BF16 checkpoint; `dgq verify"):
        inspect(str(tmp_path / "some.gguf"), base=str(base))
    with pytest.raises(InputError, match="no such directory"):
        inspect(str(base), base=str(tmp_path / "nowhere"))
