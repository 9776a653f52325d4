"""Adds an evaluation to the report of a validation, whose page, JSON and CSV are drawn anew.

report.json ── files by their SHA-256 ── EvaluationResult ──> report.json, report.html, evaluation.csv
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgq.convert.validation.report.evaluation import EvaluationResult
from dgq.convert.validation.report.reading import read_result
from dgq.convert.validation.report.result import ValidationResult
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json


def check_report(report: Path, files: Mapping[str, Mapping[str, Any]]) -> ValidationResult:
    """The report in a directory. files: artifact -> its files' bytes and SHA-256. InputError if the directory holds no
    report, or the report judged other files."""
    file = report / "report.json"
    whole = read_result(file, read_json(file))
    judged = [one.files for one in whole.artifacts]
    for name, mine in files.items():
        if mine not in judged:
            raise InputError(
                f"--report {report}: does not judge the files of {name}, by their SHA-256; validate it first"
            )
    return whole


def join(result: EvaluationResult, report: Path) -> None:
    """Write the report anew with the evaluation in it. Each file is replaced when the new one is whole."""
    from dgq.convert.validation.report.render import write  # brings matplotlib

    whole = replace(check_report(report, {}), evaluation=result)
    fresh = report.absolute().parent / f".{report.name[:200]}.evaluated"
    shutil.rmtree(fresh, ignore_errors=True)
    write(whole, fresh)
    for file in sorted(fresh.iterdir()):
        file.replace(report / file.name)
    fresh.rmdir()
