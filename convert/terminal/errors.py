"""Errors as the command line shows them: one line, and an exit code."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import click

from dgq.convert.terminal.signals import unwind_on_signals
from dgq.quant.errors import InputError


class OneLineErrors(click.Group):
    """Bad input ends in one line and exit code 2, whatever command it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        unwind_on_signals()
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here and not at exit, where a full disk would end in a traceback
            return result
        except InputError as error:
            click.echo(f"dgq: error: {error}", err=True)
            sys.exit(2)
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; it may not have been imported
                raise
            click.echo("dgq: error: the GPU's memory ran out; free some, or give less with --vram", err=True)
            sys.exit(2)
        except OSError as error:
            with suppress(OSError):
                sys.stdout.close()  # what could not be written is lost; closing drops it
            click.echo(f"dgq: error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("dgq: interrupted", err=True)
            sys.exit(130)
