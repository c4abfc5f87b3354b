import signal

import pytest
from etpo.callbacks.interrupt import InterruptGuard


def test_a_lost_interrupt_comes_again_at_the_next_batch():
    before = signal.getsignal(signal.SIGINT)
    guard = InterruptGuard()
    guard.setup(None, None, "fit")
    try:
        guard.on_train_batch_start(None, None, None, 0)
        with pytest.raises(KeyboardInterrupt):  # here a finaliser would drop it
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            guard.on_train_batch_start(None, None, None, 1)
    finally:
        guard.teardown(None, None, "fit")
    assert signal.getsignal(signal.SIGINT) is before
