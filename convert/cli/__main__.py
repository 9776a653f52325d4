"""The command line: the group, and one module a command.

Each command's module imports what is heavy inside the command, so that `dgq --help` answers at once.
Exit codes: 0 done, 1 a check failed, 2 bad input or usage, 130 interrupted, 128 + number ended by that signal.
"""

from __future__ import annotations

import os

import click

from dgq.convert.cli.bench import bench
from dgq.convert.cli.calibrate import calibrate
from dgq.convert.cli.convert import convert
from dgq.convert.cli.demo import demo
from dgq.convert.cli.eval import evaluate
from dgq.convert.cli.inspect import inspect
from dgq.convert.cli.mix import mix
from dgq.convert.cli.plan import plan
from dgq.convert.cli.publish import publish
from dgq.convert.cli.run import run
from dgq.convert.cli.terminal.errors import OneLineErrors
from dgq.convert.cli.validate import validate
from dgq.convert.cli.verify import verify

# This stands before torch is imported. OpenMP threads that spin while they wait make small products a hundred times
# slower as soon as another process wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# CUDA's memory comes in segments that grow: with segments of fixed sizes, 1 GiB lay unused between the weights of a
# loaded Q4_K_M.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dgq")
def main() -> None:
    """Quantise, inspect and run DiffusionGemma.

    SRC is a BF16 checkpoint directory, a Hub id (USER/NAME) or `tiny`, the small trained model that ships with dgq.
    """


for command in (demo, plan, calibrate, mix, convert, inspect, verify, run, validate, evaluate, bench, publish):
    main.add_command(command)

if __name__ == "__main__":
    main()
