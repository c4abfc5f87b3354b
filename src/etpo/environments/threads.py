"""A thread that the end of the process does not wait for."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any


class DaemonThread:
    """Runs calls one after the other, in a daemon thread.

    Python waits at its end for the threads of a `ThreadPoolExecutor`: a call that never returns
    would keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self.calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self.last: Future[Any] | None = None
        Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """What `function` returns or raises, once the calls before it are done."""
        self.last = Future()
        self.calls.put((self.last, partial(function, *args, **kwargs)))
        return self.last

    @property
    def busy(self) -> bool:
        """Whether a call has not returned yet."""
        return self.last is not None and not self.last.done()

    def stop(self) -> None:
        """Ends the thread after the calls so far."""
        self.calls.put(None)

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:  # SystemExit would end this thread alone, and silently
                future.set_exception(error)
