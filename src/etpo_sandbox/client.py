"""Client of a fork server: start it, send programs, check the replies."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from etpo_sandbox import confinement, protocol

_SOURCE = Path(__file__).parents[1]
_START_SECONDS = 120.0
_PROBABILITY_TOLERANCE = 1e-6
_SERVER = """import json, sys
settings, *sys.path = sys.argv[1:]
del sys.argv[1:]
from etpo_sandbox.server import main
main(**json.loads(settings))
"""


@dataclass(frozen=True)
class Split:
    """One split: x_train [n, d] float64, y_train [n] int64 in 0..n_classes-1, x_test [m, d]."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray


@dataclass(frozen=True)
class Reply:
    """Result of one program on one split: probabilities [m, n_classes], or an error text.

    cpu_seconds: CPU time of all threads. answered_late: true if the program exceeded the idle limit
    only because this process was stopped and did not serve it.
    """

    probabilities: np.ndarray | None
    error: str | None
    cpu_seconds: float
    answered_late: bool = False


class ServerError(RuntimeError):
    """A server ended, hangs or cannot confine a program."""


class Server:
    """A fork server that runs one program at a time; not thread-safe."""

    def __init__(self, level: str, deadline: float, memory_mib: int) -> None:
        self._deadline = deadline
        # exceeded only by a server that hangs, not on a loaded machine
        self._patience = 120 + 20 * deadline
        settings = {"level": level, "deadline": deadline, "memory_mib": memory_mib}
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                _command(level, settings),
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        _send_own_pidfd(self._control)

    def wait_started(self) -> None:
        """Wait until the server is ready; raise ServerError with its last output if it fails."""
        self._control.settimeout(_START_SECONDS)
        started = False
        with contextlib.suppress(OSError):
            started = self._control.recv(1) == protocol.STARTED
        if not started:
            self._control.close()
            self.process.kill()
            lines = self.process.stderr.read().decode("utf-8", "replace").strip().splitlines()
            self.close()
            reason = lines[-1] if lines else f"no answer in {_START_SECONDS:g} seconds"
            raise ServerError(f"the sandbox server did not start: {reason}")
        self.process.stderr.close()
        self._control.settimeout(self._patience)

    def run(self, program: str, split: Split, n_classes: int, seed: int) -> Reply:
        """Run one program on one split in a new child. Raises ServerError."""
        try:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    socket.send_fds(self._control, [protocol.JOB], [theirs.fileno()])
                ours.settimeout(self._patience)
                answer, delivered = _converse(ours, program, split, n_classes, seed)
            self._control.sendall(protocol.STOP)
            report = _receive(self._control, protocol.REPORT.size)
        except OSError as error:
            raise ServerError(f"a sandbox server stopped answering: {error}") from error
        if len(report) < protocol.REPORT.size:
            raise ServerError("a sandbox server ended")
        return self._reply(answer, protocol.REPORT.unpack(report), split, n_classes, delivered)

    def close(self) -> None:
        """Stop the server and its child."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stderr.close()

    def _reply(
        self, answer: bytes, report: tuple, split: Split, n_classes: int, delivered: bool
    ) -> Reply:
        limit, status, seconds = report
        tag, payload = answer[:1], answer[1:]
        if tag == protocol.FAILED:
            return Reply(None, clean_text(payload), seconds)
        shape = (len(split.x_test), n_classes)
        if tag == protocol.RESULT and len(payload) == 8 * shape[0] * shape[1]:
            probabilities = np.frombuffer(payload, np.float64).reshape(shape)
            error = check_probabilities(probabilities)
            return Reply(None if error else probabilities, error, seconds)
        stuck = not delivered or tag == protocol.RESULT  # the child waited for this process
        late = stuck and limit == protocol.IDLE_LIMIT
        return Reply(None, self._end_text(limit, status), seconds, answered_late=late)

    def _end_text(self, limit: bytes, status: int) -> str:
        if limit == protocol.CPU_LIMIT:
            return f"TimeoutError: more than {self._deadline:g} CPU seconds"
        if limit == protocol.IDLE_LIMIT:
            return f"TimeoutError: idle for more than {self._deadline:g} seconds"
        if limit == protocol.THREAD_LIMIT:
            return f"RuntimeError: more than {protocol.MAX_THREADS} threads"
        code = os.waitstatus_to_exitcode(status)
        reason = f"signal {-code}" if code < 0 else f"exit status {code}"
        return f"RuntimeError: the program ended the process ({reason})"


def check_probabilities(probabilities: np.ndarray) -> str | None:
    """Return an error text if [m, n_classes] are no class probabilities, else None.

    With three or more classes each row must sum to one, as one-vs-one ROC AUC requires.
    """
    if not np.isfinite(probabilities).all():
        return "ValueError: predict_proba returned NaN or infinite values"
    tolerance = _PROBABILITY_TOLERANCE
    if not ((probabilities >= -tolerance) & (probabilities <= 1 + tolerance)).all():
        return "ValueError: predict_proba returned values outside 0 to 1"
    if probabilities.shape[1] > 2 and not np.allclose(probabilities.sum(axis=1), 1):
        return "ValueError: the rows of predict_proba do not sum to 1"
    return None


def clean_text(data: bytes) -> str:
    """Decode untrusted bytes to one line of at most 600 bytes of printable text."""
    decoded = data.decode("utf-8", "replace")
    text = "".join(c if c.isprintable() else " " for c in decoded).strip()
    text = text.encode()[: protocol.MAX_ERROR_BYTES].decode("utf-8", "ignore")
    return text or "RuntimeError: the program failed without a message"


def _converse(
    connection: socket.socket, program: str, split: Split, n_classes: int, seed: int
) -> tuple[bytes, bool]:
    """Return the reply, truncated if the program ended, and True if all data were sent."""
    if connection.recv(1) != protocol.CONFINED:
        reason = clean_text(_receive(connection, protocol.MAX_ERROR_BYTES))
        raise ServerError(f"the sandbox cannot confine a program: {reason}")
    n_train, n_features = split.x_train.shape
    n_test = len(split.x_test)
    code = program.encode("utf-8", "replace")
    header = protocol.HEADER.pack(seed, n_train, n_features, n_test, n_classes, len(code))
    training_rows = _raw(split.x_train, np.float64) + _raw(split.y_train, np.int64)
    if not _deliver(connection, header + code + training_rows):
        return b"", False
    tag = _receive(connection, 1)
    if tag == protocol.FITTED:
        if not _deliver(connection, _raw(split.x_test, np.float64)):
            return b"", False
        tag = _receive(connection, 1)
    sizes = {protocol.RESULT: 8 * n_test * n_classes, protocol.FAILED: protocol.MAX_ERROR_BYTES}
    return tag + _receive(connection, sizes.get(tag, 0)), True


def _deliver(connection: socket.socket, data: bytes) -> bool:
    """Send all of `data`; return False if the other end has closed."""
    try:
        connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _receive(connection: socket.socket, size: int) -> bytes:
    """Receive `size` bytes, or fewer if the other end closes."""
    data = bytearray()
    while len(data) < size:
        try:
            chunk = connection.recv(min(size - len(data), 1 << 20))
        except ConnectionResetError:  # closed with unread data
            break
        if not chunk:
            break
        data += chunk
    return bytes(data)


def _raw(array: np.ndarray, dtype: type) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _send_own_pidfd(control: socket.socket) -> None:
    """Send the server a pidfd, which becomes readable when this process ends.

    The closed socket is not enough: a forked process may hold a copy of it.
    """
    try:
        pidfd = os.pidfd_open(os.getpid())
    except (AttributeError, OSError):  # not Linux, or before 5.3
        control.sendall(protocol.PARENT)
        return
    with contextlib.suppress(OSError):  # wait_started notices a server that is gone
        socket.send_fds(control, [protocol.PARENT], [pidfd])
    os.close(pidfd)


def _environment() -> dict[str, str]:
    """Return the server's environment variables; only LD_LIBRARY_PATH is inherited."""
    threads = ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR", "VECLIB_MAXIMUM")
    environment = {f"{name}_NUM_THREADS": "1" for name in threads}
    environment |= {
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "LOKY_MAX_CPU_COUNT": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",
        "TZ": "UTC",
    }
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _command(level: str, settings: dict[str, object]) -> list[str]:
    # -I without -E, which would ignore PYTHONHASHSEED; `_environment` is minimal anyway
    python = [sys.executable, "-s", "-P", "-c", _SERVER, json.dumps(settings)]
    command = [*python, *(path for path in sys.path if path), str(_SOURCE)]
    return [*_bubblewrap(), *command] if level == "bubblewrap" else command


def _bubblewrap() -> list[str]:
    """Return the `bwrap` command that exposes only Python and its libraries, read-only."""
    package = str(_SOURCE / "etpo_sandbox")
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")
    shown = [*system, sys.base_prefix, sys.prefix, *confinement.readable_paths()[1], package]
    command = ["bwrap", "--unshare-all", "--new-session"]
    for path in dict.fromkeys(map(str, shown)):
        command += ["--ro-bind-try", path, path]
    for path in map(str, confinement.hidden_paths()):
        command += ["--tmpfs", path, "--remount-ro", path]
    for path in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", path, path]
    # read-only: a file could carry labels from one split to the next
    return [*command, "--proc", "/proc", "--remount-ro", "/proc", "--remount-ro", "/", "--"]
