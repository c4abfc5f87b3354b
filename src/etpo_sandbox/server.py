"""The fork server: a process with scikit-learn loaded that forks one confined child per split.

`client` starts it with a minimal environment. It has no access to data or programs: it receives the
child's socket and closes its copy after the fork.
"""

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from etpo_sandbox import child, confinement, protocol, seccomp

_MODULES = """
calibration cluster compose covariance cross_decomposition datasets decomposition
discriminant_analysis dummy ensemble experimental feature_selection gaussian_process impute
inspection isotonic kernel_approximation kernel_ridge linear_model manifold metrics mixture
model_selection multiclass multioutput naive_bayes neighbors neural_network pipeline preprocessing
random_projection semi_supervised svm tree
"""
_POLL_SECONDS = 0.05


class Usage(NamedTuple):
    """Resource use of a child; `is_idle` is true if no thread is runnable."""

    cpu_seconds: float
    threads: int
    is_idle: bool


def main(level: str, deadline: float, memory_mib: int) -> None:
    """Run the server until the training process ends or closes its end of descriptor 0."""
    control = socket.socket(fileno=os.dup(0))
    alarms = socket.recv_fds(control, 1, 1)[1]  # a pidfd of the training process, or none
    if sys.platform == "linux":
        confinement.set_no_new_privileges()
    _load_libraries()
    limits = child.Limits(
        memory_mib=memory_mib,
        cpu_seconds=deadline,
        ruleset=confinement.landlock_ruleset() if level == "full" else None,
        filter=seccomp.program() if level != "unsafe" else None,
    )
    if level == "full":
        confinement.enter_namespaces()  # may lose the right to read Python's files
    if level == "bubblewrap":
        confinement.hide_from_ptrace()
    if sys.platform == "linux" and len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("the sandbox server has several threads and cannot fork safely")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    gc.collect()
    gc.freeze()
    control.sendall(protocol.STARTED)
    while True:
        if control not in select.select([control, *alarms], [], [])[0]:
            return
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if message != protocol.JOB or not descriptors:
            return
        pid = os.fork()
        if pid == 0:
            child.main(descriptors[0], limits)
        os.close(descriptors[0])
        if not _supervise(pid, control, alarms, deadline):
            return


def _supervise(pid: int, control: socket.socket, alarms: list[int], deadline: float) -> bool:
    """Watch one child and report its end; return False if the training process is gone."""
    limit = protocol.NO_LIMIT
    idle_seconds, last = 0.0, time.monotonic()
    ended = False
    while not select.select([control, *alarms], [], [], _POLL_SECONDS)[0]:
        now = time.monotonic()
        usage = None if ended else _usage(pid)
        if usage is None:
            continue
        if usage.is_idle:
            # count at most two polls if this process was delayed
            idle_seconds += min(now - last, 2 * _POLL_SECONDS)
        last = now
        limit = _limit_hit(usage, idle_seconds, deadline)
        if limit != protocol.NO_LIMIT:
            _kill(pid)
            ended = True
    try:
        parent_waits = control.recv(1, socket.MSG_DONTWAIT) == protocol.STOP
    except BlockingIOError:  # the training process has ended
        parent_waits = False
    _kill(pid)
    _, status, used = os.wait4(pid, 0)
    if parent_waits:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            limit = protocol.CPU_LIMIT
        seconds = used.ru_utime + used.ru_stime
        control.sendall(protocol.REPORT.pack(limit, status, seconds))
    return parent_waits


def _limit_hit(usage: Usage, idle_seconds: float, deadline: float) -> bytes:
    if usage.cpu_seconds > deadline:
        return protocol.CPU_LIMIT
    if idle_seconds > deadline:
        return protocol.IDLE_LIMIT
    if usage.threads > protocol.MAX_THREADS:
        return protocol.THREAD_LIMIT
    return protocol.NO_LIMIT


def _usage(pid: int) -> Usage | None:
    """Return the resource use of a child, None if it has ended.

    Threads that wait for a processor or a page count as runnable, so children are not idle on a
    loaded machine. Outside Linux all time counts as idle time.
    """
    if sys.platform != "linux":
        return Usage(0.0, 1, is_idle=True)
    tasks = Path(f"/proc/{pid}/task")
    try:
        cpu_seconds = time.clock_gettime((~pid << 3) | 2)  # see clock_getcpuclockid(3)
        names = os.listdir(tasks)
        if len(names) > protocol.MAX_THREADS:
            return Usage(cpu_seconds, len(names), is_idle=False)
        states = [(tasks / name / "stat").read_text().rpartition(") ")[2][0] for name in names]
    except (OSError, IndexError):
        return None
    return Usage(cpu_seconds, len(states), is_idle=not set(states) & {"R", "D"})


def _kill(pid: int) -> None:
    """Kill a child and its process group, which exists if forking is allowed."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _load_libraries() -> None:
    """Import the libraries that programs use, without starting a thread."""
    warnings.simplefilter("ignore")
    sys.modules["pyarrow"] = None  # it would start a thread
    import numpy as np
    import pandas  # noqa: F401

    del sys.modules["pyarrow"]
    for name in _MODULES.split():
        importlib.import_module(f"sklearn.{name}")
    x = np.random.RandomState(0).normal(size=(40, 3))
    sys.modules["sklearn.linear_model"].LogisticRegression().fit(x, x[:, 0] > 0).predict_proba(x)
    # reads /proc to find thread pools, which a confined program cannot
    sys.modules["sklearn.cluster"].KMeans(2, n_init=1).fit(x)
