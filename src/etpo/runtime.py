"""Process settings of the console scripts: memory, signals, warnings."""

import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTED, TERMINATED = 130, 143  # exit status after Ctrl-C and after SIGTERM
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep the memory of large tensors: a quarter of a training step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # else another C library
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def silence_libraries() -> None:
    """Hide progress bars, retries of the hub, and hints of Lightning about an intended loop."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by transformers at import
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # prints its table
    for message in (
        r"Found \d+ module\(s\) in eval mode",
        r"Your `IterableDataset` has `__len__` defined",
        r".*does not have many workers",
        r".*exists and is not empty",
        r".*treespec, LeafSpec",
        r"`(is_)?gradient_checkpointing(_enable)?` is deprecated",
        r"torch\.distributed\.nn\.functional\.all_gather is deprecated",
    ):
        warnings.filterwarnings("ignore", message)


@contextmanager
def signals_end_process() -> Iterator[None]:
    """Exit with status 143 at SIGTERM, and never lose an exit or a Ctrl-C.

    Lightning alone would wait for the next batch, and lose a SIGTERM after the last one. Python
    drops an exception that a signal handler raises inside a finaliser or a weakref callback; an
    alarm raises it again.
    """
    dropped: list[BaseException] = []
    report = sys.unraisablehook

    def terminate(number: int, frame: FrameType | None) -> None:
        sys.exit(TERMINATED)

    def retry(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
            dropped.append(unraisable.exc_value)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            report(unraisable)

    def raise_dropped(number: int, frame: FrameType | None) -> None:
        raise dropped.pop()

    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: terminate,
        signal.SIGALRM: raise_dropped,
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    sys.unraisablehook = retry
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report
        for number, handler in previous.items():
            signal.signal(number, handler)
