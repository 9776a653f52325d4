"""A chat template that is not the released model's is told, by what the real checkpoint's headers say it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from sparse26b import write_sparse_26b

from dgq.convert.cli.__main__ import main
from dgq.convert.verification import template
from dgq.convert.verification.template import digest, template_remarks
from dgq.runtime.files.artifact import Artifact, open_artifact

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
OLD = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_26b(tmp_path_factory.mktemp("template") / "real")


def remarks(path: Path) -> list[str]:
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["remarks"]
    assert isinstance(found, list)
    return found


def test_what_has_the_releases_shape_wants_its_template(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its SHA-256 is what Google's repository has for the file; a .jinja counts before tokenizer_config.json."""
    file = real / "chat_template.jinja"
    assert [line.split(";")[0] for line in remarks(real)] == ["its chat template is missing"]
    file.write_text(OLD)
    (line,) = remarks(real)
    assert f"({digest(OLD)[:12]}); google/diffusiongemma-26B-A4B-it's is 9aeb7eac68ad" in line and "older" in line
    page = CliRunner().invoke(main, ["inspect", str(real)]).stdout
    assert line in page
    monkeypatch.setitem(template.KNOWN, digest(OLD), "another model's")
    assert "is another model's (" in remarks(real)[0]
    monkeypatch.setattr(template, "RELEASED", digest(OLD))
    assert remarks(real) == []
    file.unlink()
    (real / "tokenizer_config.json").write_text(json.dumps({"chat_template": OLD}))
    assert remarks(real) == []
    (real / "tokenizer_config.json").unlink()


def test_other_models_may_have_their_own() -> None:
    assert remarks(TINY_A) == [] and remarks(TINY_A / "reference.Q4_K_M.gguf") == []
    assert CliRunner().invoke(main, ["inspect", "tiny"]).exit_code == 0


def test_a_gguf_is_held_against_its_directory_and_source(tmp_path: Path) -> None:
    """And what dgq.json says it was made from counts as much as its shape."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_A / name, tmp_path / name)
    shutil.copyfile(TINY_A / "reference.Q4_K_M.gguf", tmp_path / "model.gguf")
    found = open_artifact(tmp_path)
    inside = template._templates(found)[0]
    assert inside
    (tmp_path / "chat_template.jinja").write_text(inside)
    assert template_remarks(found) == () == template_remarks(found, open_artifact(TINY_A))
    (tmp_path / "dgq.json").write_text(json.dumps({"source": {"repository": template.REPOSITORY}}))
    assert len(template_remarks(found)) == 1
    (tmp_path / "chat_template.jinja").write_text(OLD)
    assert "beside it" in template_remarks(found)[0]
    bare: Artifact = open_artifact(tmp_path / "model.gguf")
    assert template_remarks(bare) == ()
    (tmp_path / "dgq.json").unlink()
    lines = template_remarks(found, open_artifact(TINY_A))
    assert len(lines) == 2 and digest(OLD)[:12] in lines[1] and "not tinyA's" in lines[1]
