"""`Sandbox`: runs many programs at once on a pool of fork servers."""

import heapq
import logging
import math
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from etpo.environments.sandbox import confinement, probe
from etpo.environments.sandbox.client import Reply, Server, ServerError, Split
from etpo.errors import ConfigError

LEVELS = ("full", "bubblewrap", "unsafe")
MIN_DEADLINE = 0.1
MIN_MEMORY_MIB = 512
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a program is worth on its splits.

    probabilities: per split [m, n_classes] float64 in [0, 1] (a tolerance of 1e-6); None after a
    failure. error: `TypeName: message` of the first split that failed, one line of at most 600
    bytes; None after a success. seconds: CPU seconds over the splits up to that one.
    """

    probabilities: tuple[np.ndarray, ...] | None
    error: str | None
    seconds: float


class Sandbox:
    """Runs programs that nobody has read: each on each split in a confined process of its own.

    A program is Python source that defines `build_model(x_train, y_train)` and returns a fitted
    classifier with `predict_proba`. `level="full"` confines by Landlock and seccomp (Linux 5.13 or
    later, x86-64 or ARM64) and falls back to bubblewrap where Landlock is missing; `unsafe`
    confines nothing but memory and time. `workers`: fork servers (default: one per usable core).
    `deadline`: CPU seconds per split, and as many seconds in which no thread of the program wants
    to run, so that load on the machine makes no program fail. `memory_mib`: address space per
    program, about 350 MiB of which the libraries take.

    Raises ConfigError for a value that is not allowed or a level that this machine cannot give.
    """

    def __init__(
        self,
        *,
        level: str = "full",
        workers: int | None = None,
        deadline: float = 10.0,
        memory_mib: int = 2048,
    ) -> None:
        if workers is not None:
            _check_at_least("workers", workers, 1)
        _check_at_least("deadline", deadline, MIN_DEADLINE)
        _check_at_least("memory_mib", memory_mib, MIN_MEMORY_MIB)
        self._level = available_level(level)
        self._workers = workers or usable_cores()
        self.deadline = float(deadline)
        self.memory_mib = memory_mib
        self._servers: list[Server] = []
        self._closing = threading.Event()
        self._finalizer = weakref.finalize(self, _close_all, self._servers)

    @property
    def level(self) -> str:
        """The level in force: full, bubblewrap or unsafe."""
        return self._level

    def __enter__(self) -> "Sandbox":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the servers and attack one of them; does nothing if they run.

        Raises ConfigError where the self-test breaks out, RuntimeError if a server does not start.
        """
        if self._servers:
            return
        if self._level == "unsafe":
            _log.warning("environment.sandbox.level=unsafe: programs run without protection")
        self._closing.clear()
        try:
            for _ in range(self._workers):
                self._servers.append(self._new_server())
            for server in self._servers:
                server.wait_started()
            if self._level != "unsafe":
                self._attack(self._servers[0])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the servers and what they run; `start` or `run` start them again."""
        self._closing.set()
        _close_all(self._servers)

    def run(
        self,
        programs: Sequence[str],
        splits: Sequence[Split],
        n_classes: int,
        seed: int | Sequence[int],
        on_result: Callable[[int, Outcome], None] | None = None,
    ) -> list[Outcome]:
        """One `Outcome` per program, in their order, whatever the number of workers.

        A program that fails on a split is not run on those after it; its other splits start once
        the first has passed. `seed` (one for all or one per program, 0..2**32-1) plus the number
        of the split seeds NumPy and `random`. `on_result(index, outcome)` is called in this thread
        as each program finishes. Raises RuntimeError if a server fails twice on one split; the
        sandbox is closed then.
        """
        seeds = np.broadcast_to(seed, len(programs)).tolist()
        self.start()
        outcomes: list[Outcome | None] = [None] * len(programs)
        replies: list[dict[int, Reply]] = [{} for _ in programs]
        ready = [(index, 0) for index in range(len(programs))]  # a heap of (program, split)
        free = list(range(len(self._servers)))
        running: dict[Future[Reply], tuple[int, int, int]] = {}  # program, split, server
        with ThreadPoolExecutor(len(self._servers), "sandbox") as pool:
            try:
                while ready or running:
                    while ready and free:
                        index, number = heapq.heappop(ready)
                        if any(reply.error for reply in replies[index].values()):
                            continue
                        server = free.pop()
                        job = pool.submit(
                            self._run_split,
                            server,
                            programs[index],
                            splits[number],
                            n_classes,
                            (seeds[index] + number) % 2**32,
                        )
                        running[job] = index, number, server
                    for job in wait(running, return_when=FIRST_COMPLETED).done:
                        index, number, server = running.pop(job)
                        free.append(server)
                        replies[index][number] = job.result()
                        if number == 0:
                            for following in range(1, len(splits)):
                                heapq.heappush(ready, (index, following))
                        if outcomes[index] is None:
                            outcomes[index] = _outcome(replies[index], len(splits))
                            if outcomes[index] is not None and on_result is not None:
                                on_result(index, outcomes[index])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise
        return outcomes

    def _run_split(
        self, index: int, program: str, split: Split, n_classes: int, seed: int
    ) -> Reply:
        """Run one split; once more on a new server if the server failed, once more if late."""
        try:
            reply = self._servers[index].run(program, split, n_classes, seed)
            if not reply.answered_late:
                return reply
        except ServerError as error:
            if self._closing.is_set():
                raise
            _log.warning("%s; it is started again", error)
            self._servers[index].close()
            self._servers[index] = self._new_server()
            self._servers[index].wait_started()
        return self._servers[index].run(program, split, n_classes, seed)

    def _new_server(self) -> Server:
        return Server(self._level, self.deadline, self.memory_mib)

    def _attack(self, server: Server) -> None:
        x = np.arange(8.0).reshape(4, 2)
        try:
            failure = server.run(probe.PROGRAM, Split(x, np.arange(4) % 2, x), 2, 0).error
        except ServerError as error:
            failure = str(error)
        if failure is not None:
            raise ConfigError(
                f"environment.sandbox.level={self._level} does not hold on this machine "
                f"({failure}); level=unsafe runs programs without protection"
            )


def _outcome(replies: dict[int, Reply], n_splits: int) -> Outcome | None:
    """What a program's replies by split add up to; None while one is missing that matters."""
    seconds = 0.0
    for number in range(n_splits):
        if number not in replies:
            return None
        seconds += replies[number].cpu_seconds
        if replies[number].error is not None:
            return Outcome(None, replies[number].error, seconds)
    return Outcome(tuple(replies[n].probabilities for n in range(n_splits)), None, seconds)


def available_level(level: str) -> str:
    """The level that this machine gives for `level`; raises ConfigError if there is none."""
    key = "environment.sandbox.level"
    if level not in LEVELS:
        raise ConfigError(f"{key}={level} is unknown; allowed: {', '.join(LEVELS)}")
    if level == "unsafe" or (level == "full" and confinement.is_full_supported()):
        return level
    if shutil.which("bwrap") and confinement.is_filter_supported():
        return "bubblewrap"
    missing = "bwrap" if level == "bubblewrap" else "Landlock (Linux 5.13 or later) or bwrap"
    raise ConfigError(
        f"{key}={level} needs {missing} on x86-64 or ARM64 Linux; "
        f"{key}=unsafe runs programs without protection"
    )


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_at_least(key: str, value: object, lowest: float) -> None:
    """A finite number from `lowest` on, a whole one where `lowest` is."""
    kind = int if isinstance(lowest, int) else (int, float)
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not lowest <= value < math.inf:
        raise ConfigError(
            f"environment.sandbox.{key}={value} is not allowed; a number, {lowest} or more"
        )


def _close_all(servers: list[Server]) -> None:
    while servers:
        servers.pop().close()
