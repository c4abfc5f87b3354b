"""Forked child: drop all rights, run the program, send the probabilities.

The program runs in this process, so replies cannot be trusted: the training process checks them,
and the server ends the child.
"""

import os
import random
import sys
import types
from typing import Any, NamedTuple

import joblib
import numpy as np

from etpo_sandbox import confinement, protocol

# longest first: site-packages is inside the folder of the standard library
_IMPORT_FOLDERS = sorted((f"{path}{os.sep}" for path in sys.path if path), key=len, reverse=True)


class Limits(NamedTuple):
    """Limits of a child; `ruleset` (Landlock) and `filter` (seccomp) are None if unused."""

    memory_mib: int
    cpu_seconds: float
    ruleset: int | None
    filter: bytes | None


def main(descriptor: int, limits: Limits) -> None:
    """Confine this process, run one program on one split, and end the process."""
    status = 1
    try:
        try:
            descriptor = _confine(descriptor, limits)
            message = protocol.RESULT + _run(descriptor).tobytes()
        except BaseException as error:
            message = protocol.FAILED + _describe(error, limits.memory_mib)
        _send(descriptor, message)
        status = 0
    finally:
        os._exit(status)


def _run(descriptor: int) -> np.ndarray:
    """Receive a program and its data, and return its probabilities [n_test, n_classes]."""
    _send(descriptor, protocol.CONFINED)
    seed, n_train, n_features, n_test, n_classes, n_bytes = protocol.HEADER.unpack(
        _receive(descriptor, protocol.HEADER.size)
    )
    program = _receive(descriptor, n_bytes).decode()
    x_train = _receive_array(descriptor, (n_train, n_features), np.float64)
    y_train = _receive_array(descriptor, (n_train,), np.int64)
    _seed(seed)
    # joblib runs `n_jobs` sequentially: no process, and sums in a fixed order
    with joblib.parallel_config(backend="sequential"):
        model = _fit(program, x_train, y_train)
        _send(descriptor, protocol.FITTED)
        x_test = _receive_array(descriptor, (n_test, n_features), np.float64)
        return _probabilities(model, x_test, n_classes)


def _confine(descriptor: int, limits: Limits) -> int:
    """Drop every right of this process; return the new number of `descriptor`."""
    os.setsid()
    confinement.limit_resources(limits.memory_mib, limits.cpu_seconds)
    if sys.platform == "linux":
        confinement.die_with_parent()
    if limits.filter is not None:
        confinement.drop_capabilities()
    if limits.ruleset is not None:
        confinement.restrict_files(limits.ruleset)
    os.dup2(descriptor, 3)
    os.closerange(4, confinement.MAX_OPEN_FILES)
    if limits.filter is not None:
        confinement.restrict_system_calls(limits.filter)
    return 3


def _seed(seed: int) -> None:
    """Seed every generator, including NumPy generators made without a seed."""
    random.seed(seed)
    np.random.seed(seed)
    np.random.bit_generator.randbits = random.Random(seed).getrandbits


def _fit(program: str, x_train: np.ndarray, y_train: np.ndarray) -> Any:
    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    if "build_model" not in module.__dict__:
        raise NameError("name 'build_model' is not defined")
    return module.__dict__["build_model"](x_train, y_train)


def _probabilities(model: Any, x_test: np.ndarray, n_classes: int) -> np.ndarray:
    """Predict float64 [n_test, n_classes], with zeros for classes missing in training."""
    probabilities = np.asarray(model.predict_proba(x_test))
    if probabilities.dtype.kind not in "biuf":
        raise TypeError(f"predict_proba returned dtype {probabilities.dtype}, not floats")
    probabilities = probabilities.astype(np.float64)
    shape = probabilities.shape
    classes = np.asarray(getattr(model, "classes_", range(n_classes)))
    if shape == (len(x_test), len(classes)) and np.isin(classes, range(n_classes)).all():
        placed = np.zeros((len(x_test), n_classes))
        placed[:, classes.astype(np.int64)] = probabilities
        return placed
    if shape != (len(x_test), n_classes):
        expected = (len(x_test), n_classes)
        raise ValueError(f"predict_proba returned shape {shape}, expected {expected}")
    return probabilities


def _describe(error: BaseException, memory_mib: int) -> bytes:
    """Return `TypeName: message`, as the last line of a traceback, in at most 600 bytes.

    Import folders are removed from paths: the text becomes part of a prompt, which must not depend
    on the installation.
    """
    error.__traceback__ = None  # free the frames' arrays
    name = type(error).__name__
    try:
        message = str(error)
    except Exception:
        message = "<exception str() failed>"
    if isinstance(error, MemoryError):
        name, message = "MemoryError", message or f"more than {memory_mib} MiB"
    elif isinstance(error, SyntaxError):
        message = f"{error.msg} (line {error.lineno})"
    limit = protocol.MAX_ERROR_BYTES
    for folder in _IMPORT_FOLDERS:
        message = message.replace(folder, "")
    text = f"{name[:limit]}: {message[:limit]}" if message else name[:limit]
    return text.encode("utf-8", "replace")[:limit]


def _send(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _receive(descriptor: int, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(descriptor, min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError("the training process closed the connection")
        data += chunk
    return data


def _receive_array(descriptor: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    data = _receive(descriptor, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()
