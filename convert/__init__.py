"""Makes and judges artifacts. The commands' work, for programs:

    from pathlib import Path
    import dgq.convert
    from dgq.convert.write.conversion import ConvertOptions

    print(dgq.convert.plan("tiny", "nvfp4").needs["disk"])
    dgq.convert.calibrate("tiny", Path("tiny.stats"))
    artifact = dgq.convert.convert("tiny", "nvfp4", "tiny-NVFP4", ConvertOptions(stats=Path("tiny.stats")))
    dgq.convert.verify(artifact.path)

Each function does what the command of its name does, raises dgq.quant.errors.InputError with one line for everything
that is wrong with its input, and prints nothing: callbacks get the progress and the notices. A function's module is
imported when the function is asked for, since torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgq.convert.calibration.survey import calibrate as calibrate
    from dgq.convert.estimate.forecast import plan as plan
    from dgq.convert.mixture.mix import mix as mix
    from dgq.convert.publication.publish import publish as publish
    from dgq.convert.run.demo import demo as demo
    from dgq.convert.validation.flow import validate as validate
    from dgq.convert.verification.inspect import inspect as inspect
    from dgq.convert.verification.verify import verify as verify
    from dgq.convert.write.conversion import convert as convert

PUBLIC = {
    "plan": "dgq.convert.estimate.forecast",
    "convert": "dgq.convert.write.conversion",
    "calibrate": "dgq.convert.calibration.survey",
    "mix": "dgq.convert.mixture.mix",
    "inspect": "dgq.convert.verification.inspect",
    "verify": "dgq.convert.verification.verify",
    "validate": "dgq.convert.validation.flow",
    "publish": "dgq.convert.publication.publish",
    "demo": "dgq.convert.run.demo",
}
"""Public function -> the module that has it under the same name."""


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
