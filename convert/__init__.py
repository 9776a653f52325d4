"""Makes and judges artifacts. The commands' work, for programs:

    from dgq import convert

    print(convert.plan("tiny", "nvfp4").needs["disk"])
    options = convert.ConvertOptions(effort="stock")
    artifact = convert.convert("tiny", "nvfp4", "tiny-NVFP4", options, notice=print)
    print(convert.verify(artifact.path).ok)

Each function does what the command of its name does, with the same defaults, raises dgq.quant.errors.InputError with
one line for everything that is wrong with its input, and prints nothing: callbacks get the progress and the notices. A
name's module is imported when the name is asked for, since torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgq.convert.calibration.calibrate import CalibrateOptions as CalibrateOptions
    from dgq.convert.calibration.calibrate import calibrate as calibrate
    from dgq.convert.estimate.forecast import PlanOptions as PlanOptions
    from dgq.convert.estimate.forecast import plan as plan
    from dgq.convert.mixture.mix import MixOptions as MixOptions
    from dgq.convert.mixture.mix import mix as mix
    from dgq.convert.publication.publish import PublishOptions as PublishOptions
    from dgq.convert.publication.publish import publish as publish
    from dgq.convert.run.demo import demo as demo
    from dgq.convert.validation.evaluation.evaluate import evaluate as evaluate
    from dgq.convert.validation.evaluation.options import EvaluateOptions as EvaluateOptions
    from dgq.convert.validation.flow import validate as validate
    from dgq.convert.validation.inputs import ValidateOptions as ValidateOptions
    from dgq.convert.verification.inspect import inspect as inspect
    from dgq.convert.verification.verify import VerifyOptions as VerifyOptions
    from dgq.convert.verification.verify import verify as verify
    from dgq.convert.write.conversion import ConvertOptions as ConvertOptions
    from dgq.convert.write.conversion import convert as convert

PUBLIC = {
    "plan": "dgq.convert.estimate.forecast",
    "PlanOptions": "dgq.convert.estimate.forecast",
    "calibrate": "dgq.convert.calibration.calibrate",
    "CalibrateOptions": "dgq.convert.calibration.calibrate",
    "mix": "dgq.convert.mixture.mix",
    "MixOptions": "dgq.convert.mixture.mix",
    "convert": "dgq.convert.write.conversion",
    "ConvertOptions": "dgq.convert.write.conversion",
    "inspect": "dgq.convert.verification.inspect",
    "verify": "dgq.convert.verification.verify",
    "VerifyOptions": "dgq.convert.verification.verify",
    "validate": "dgq.convert.validation.flow",
    "ValidateOptions": "dgq.convert.validation.inputs",
    "evaluate": "dgq.convert.validation.evaluation.evaluate",
    "EvaluateOptions": "dgq.convert.validation.evaluation.options",
    "publish": "dgq.convert.publication.publish",
    "PublishOptions": "dgq.convert.publication.publish",
    "demo": "dgq.convert.run.demo",
}
"""Public name -> the module that has it."""


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
