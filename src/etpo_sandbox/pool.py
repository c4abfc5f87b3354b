"""`Sandbox`: run many programs at once on a pool of fork servers."""

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

from etpo_sandbox import confinement, probe
from etpo_sandbox.client import Reply, Server, ServerError, Split

LEVELS = ("full", "bubblewrap", "unsafe")
MIN_DEADLINE = 0.1
MIN_MEMORY_MIB = 512
_log = logging.getLogger("etpo.sandbox")  # child of "etpo", whose records go to train.log


class SandboxError(ValueError):
    """A setting is not allowed, or the machine does not support the level."""


@dataclass(frozen=True)
class Outcome:
    """Result of one program on its splits."""

    probabilities: tuple[np.ndarray, ...] | None  # [m, n_classes] float64 in [0, 1] (+- 1e-6) each
    error: str | None  # `TypeName: message` of the first failure, one line, at most 600 bytes
    seconds: float  # CPU seconds of all splits up to the first failure


class Sandbox:
    """Run untrusted programs in confined processes, one process per program and split.

    A program is Python source with a function `build_model(x_train, y_train)` that returns a fitted
    classifier with `predict_proba`.

    Args:
        level: `full` uses Landlock and seccomp (Linux 5.13 or later, x86-64 or ARM64), or
            `bubblewrap` if Landlock is missing; `unsafe` limits only memory and time.
        workers: number of fork servers; None: one per usable core.
        deadline: limit per split of CPU seconds, and of seconds without a runnable thread.
            Wall-clock time is not limited, so programs do not fail on a loaded machine.
        memory_mib: address space per program; the libraries take about 350 MiB of it.

    Raises SandboxError if a value is not allowed or the machine does not support the level.
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
        """Return the level in force: full, bubblewrap or unsafe."""
        return self._level

    def __enter__(self) -> "Sandbox":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the servers and run the self-test on one of them, unless they are running.

        Raises SandboxError if the self-test fails, RuntimeError if a server does not start.
        """
        if self._servers:
            return
        if self._level == "unsafe":
            _log.warning("sandbox level=unsafe: programs run without protection")
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
        """Stop the servers and their programs; `start` or `run` starts them again."""
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
        """Return one `Outcome` per program, in order, independent of the number of workers.

        The first split of a program runs alone; after a failure the others are skipped. NumPy and
        `random` are seeded with `seed` (0 to 2**32 - 1, one for all or one per program) plus the
        number of the split. `on_result(index, outcome)` is called in this thread after a program.
        Closes the sandbox and raises RuntimeError if a server fails twice on one split.
        """
        self.start()
        seeds = np.broadcast_to(seed, len(programs)).tolist()
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
                        server, split = free.pop(), splits[number]
                        split_seed = (seeds[index] + number) % 2**32
                        job = pool.submit(
                            self._run_split, server, programs[index], split, n_classes, split_seed
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
        """Run one split and repeat it once if the server failed or replied late."""
        try:
            reply = self._servers[index].run(program, split, n_classes, seed)
            if not reply.answered_late:
                return reply
        except ServerError as error:
            if self._closing.is_set():
                raise
            _log.warning("%s; restarting it", error)
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
            raise SandboxError(
                f"level={self._level} does not hold on this machine "
                f"({failure}); level=unsafe runs programs without protection"
            )


def _outcome(replies: dict[int, Reply], n_splits: int) -> Outcome | None:
    """Combine a program's replies by split; None while a required one is missing."""
    seconds = 0.0
    for number in range(n_splits):
        if number not in replies:
            return None
        seconds += replies[number].cpu_seconds
        if replies[number].error is not None:
            return Outcome(None, replies[number].error, seconds)
    return Outcome(tuple(replies[n].probabilities for n in range(n_splits)), None, seconds)


def available_level(level: str) -> str:
    """Return the level that this machine uses for `level`; SandboxError if unsupported."""
    if level not in LEVELS:
        raise SandboxError(f"level={level} is unknown; allowed: {', '.join(LEVELS)}")
    has_filter = confinement.is_filter_supported()
    if level == "unsafe" or (level == "full" and has_filter and confinement.landlock_abi()):
        return level
    if has_filter and shutil.which("bwrap"):
        return "bubblewrap"
    missing = "bwrap" if level == "bubblewrap" else "Landlock (Linux 5.13 or later) or bwrap"
    raise SandboxError(
        f"level={level} needs {missing} on x86-64 or ARM64 Linux; "
        "level=unsafe runs programs without protection"
    )


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _check_at_least(key: str, value: object, lowest: float) -> None:
    """Raise SandboxError unless `value` is a finite number >= `lowest` (an int if that is one)."""
    kind = int if isinstance(lowest, int) else (int, float)
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not lowest <= value < math.inf:
        raise SandboxError(f"{key}={value} is not allowed; a number, {lowest} or more")


def _close_all(servers: list[Server]) -> None:
    while servers:
        servers.pop().close()
