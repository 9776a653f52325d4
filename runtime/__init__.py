"""Opens an artifact and runs it: one block-denoising engine for every format."""

import os

# MKL, asked before its first product: a row's bits then depend neither on where it lies nor on the rows beside it, on
# every processor that it runs on.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def __getattr__(name: str) -> object:
    """load(path), of api.py: imported when it is asked for, since torch takes a second."""
    if name == "load":
        from dgq.runtime.engine.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
