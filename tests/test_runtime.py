"""Signals end a process although Python drops the exceptions of finalisers."""

import logging
import signal
import sys
import time
import weakref

import pytest
from huggingface_hub.utils import _http

from etpo.runtime import TERMINATED, signals_end_process, silence_libraries


class Thing:
    """Something with a finaliser."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def wait_after_signal(number: int, finaliser: bool) -> None:
    """Raises the signal's exception in a finaliser or a weakref callback, then waits."""
    thing = Thing(number) if finaliser else type("Plain", (), {})()
    watch = weakref.ref(thing, lambda _: finaliser or signal.raise_signal(number))
    del thing
    deadline = time.monotonic() + 5
    while watch and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
@pytest.mark.parametrize("finaliser", [True, False])
def test_a_signal_in_a_finaliser_is_not_lost(number, raised, finaliser):
    before = sys.unraisablehook, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    with pytest.raises(raised) as ended, signals_end_process():
        wait_after_signal(number, finaliser)
    assert getattr(ended.value, "code", None) in (None, TERMINATED)
    after = sys.unraisablehook, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    assert after == before


def test_other_exceptions_of_finalisers_are_reported(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)

    class Broken:
        def __del__(self):
            raise ValueError("broken")

    with signals_end_process():
        Broken()
    (unraisable,) = reported
    assert unraisable.exc_type is ValueError


def test_retries_of_the_hub_are_silent():
    silence_libraries()
    assert not _http.logger.isEnabledFor(logging.WARNING)
