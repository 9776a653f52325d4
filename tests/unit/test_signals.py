"""What SIGTERM and SIGHUP do to a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from dgq.convert.cli.terminal.signals import ENDING, unwind_on_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The test process gets its handlers back."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_unwinds_the_command(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    unwind_on_signals()
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    assert ended.value.code == 128 + number


@pytest.mark.parametrize("number", ENDING)
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """As nohup leaves SIGHUP to the command that it starts."""
    signal.signal(number, signal.SIG_IGN)
    unwind_on_signals()
    assert signal.getsignal(number) is signal.SIG_IGN
    signal.raise_signal(number)


def test_another_thread_leaves_the_handlers_alone() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    thread = threading.Thread(target=unwind_on_signals)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
