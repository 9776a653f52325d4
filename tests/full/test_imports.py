"""What importing a package brings with it, seen from a process that has imported nothing."""

from __future__ import annotations

import subprocess
import sys
import time


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    heavy = {"torch", "numpy", "transformers", "gguf", "huggingface_hub", "pydantic", "matplotlib", "jinja2", "rich"}
    code = "import sys, dgq.convert.cli.__main__; print(*{name.split('.')[0] for name in sys.modules})"
    began = time.perf_counter()
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    print(f"import took {time.perf_counter() - began:.2f} s")
    assert not heavy & set(loaded)


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, dgq.convert; assert not {'torch', 'numpy', 'click'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
