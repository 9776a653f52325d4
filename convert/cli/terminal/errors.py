"""How a command ends: what Python raised becomes one line on stderr and an exit code.

0 done     2 bad input, a full disk, a GPU's memory that ran out     130 Ctrl-C     141 the reader of a pipe is gone
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import Any

import click

from dgq.convert.cli.terminal.signals import unwind_on_signals
from dgq.quant.errors import InputError


class _Notes(logging.Handler):
    """Shows as notes what the library has to say beside its results."""

    def emit(self, record: logging.LogRecord) -> None:
        from dgq.convert.cli.terminal.console import note

        note(record.getMessage())


class OneLineErrors(click.Group):
    """The group of dgq's commands. Every other exception than those below is a bug, and shows its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        unwind_on_signals()
        logging.getLogger("dgq").handlers = [_Notes()]
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # At Python's exit, a full disk would end in a traceback.
            return result
        except InputError as error:
            click.echo(f"dgq: error: {error}", err=True)
            sys.exit(2)
        except BrokenPipeError:  # `dgq … | head`: the output goes nowhere, so that Python's exit does not fail on it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's class, which is not imported for its name
                raise
            click.echo("dgq: error: the GPU's memory ran out; free some, or give less with --vram", err=True)
            sys.exit(2)
        except OSError as error:
            with suppress(OSError):
                sys.stdout.close()  # This drops what could not be written.
            click.echo(f"dgq: error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("dgq: interrupted", err=True)
            sys.exit(130)
