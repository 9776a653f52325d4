"""`dgq demo`: one command from `tiny` to an answer of each format."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from dgq.convert.cli.__main__ import main
from dgq.convert.run.demo import FORMATS, PROMPT


def test_demo(tmp_path: Path) -> None:
    """Artifacts that `run` opens, figures that `plan` knows, and a directory that is not written over."""
    out = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prompt"] == PROMPT
    models = {model["format"]: model for model in report["models"]}
    assert list(models) == ["bf16", *FORMATS]
    assert {path.name for path in out.iterdir()} == set(FORMATS)
    for to in FORMATS:
        model, planned = models[to], CliRunner().invoke(main, ["plan", "tiny", "--to", to, "--no-probe", "--json"])
        assert model["path"] == str(out / to) and model["convert_s"] > 0
        assert abs(model["bits"] - 8 * model["bytes"] / json.loads(planned.stdout)["params"]) < 1e-3
        assert model["bytes"] < models["bf16"]["bytes"] and 4 < model["bits"] < 10
    assert models["bf16"]["bits"] == 16 and models["bf16"]["convert_s"] is None
    assert {model["text"] for model in models.values()} == {"apple door king wind"}
    again = CliRunner().invoke(main, ["demo", "-o", str(out)])
    assert again.exit_code == 2 and again.stderr.splitlines() == [
        f"dgq: error: {out}: already exists; name another directory with -o, or remove it"
    ]
