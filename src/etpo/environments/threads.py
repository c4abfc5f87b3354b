"""A worker thread that ends with the process, even if a call never returns."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any


class DaemonThread:
    """Run calls in order; unlike a `ThreadPoolExecutor`, never delay the exit of Python."""

    def __init__(self, name: str) -> None:
        self.calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self.last: Future[Any] | None = None
        Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call and return the future of its result."""
        self.last = Future()
        self.calls.put((self.last, partial(function, *args, **kwargs)))
        return self.last

    @property
    def busy(self) -> bool:
        """Return True if a call has not returned yet."""
        return self.last is not None and not self.last.done()

    def stop(self) -> None:
        """End the thread after the queued calls."""
        self.calls.put(None)

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:  # SystemExit would silently end only this thread
                future.set_exception(error)
