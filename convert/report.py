"""stub"""

import json
from pathlib import Path
from typing import Any


def write(report: dict[str, Any], out: Path) -> None:
    out.mkdir()
    (out / "report.json").write_text(json.dumps(report))
