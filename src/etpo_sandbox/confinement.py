"""Drop the rights of a process: resource limits, capabilities, Landlock, seccomp (by ctypes).

Everything except the resource limits is Linux only; the import works everywhere.
"""

import contextlib
import ctypes
import importlib.util
import math
import os
import platform
import resource
import signal
import sys
import sysconfig
from pathlib import Path

from etpo_sandbox import seccomp

# packages that a program may read, besides the standard library
LIBRARIES = (
    *("numpy", "scipy", "pandas", "joblib", "threadpoolctl", "sklearn"),
    *("narwhals", "dateutil", "six", "pytz", "tzdata"),
)
# joblib reads the processor quota when it counts processors
_READABLE_SYSTEM_FILES = (
    "/dev/urandom",
    "/sys/fs/cgroup/cpu.max",
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us",
)
MAX_OPEN_FILES = 64

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR = 2, 4, 8
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_CAPABILITY_VERSION_3 = 0x20080522


class _RulesetAttr(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class _SockFprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def landlock_abi() -> int:
    """Return the kernel's Landlock version, 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), 1))


def readable_paths() -> tuple[list[Path], list[Path]]:
    """Return (files and folders that a program may read, folders that it may only list).

    These are the standard library and `LIBRARIES`, without site-packages and without scikit-learn's
    data files, which contain test rows.
    """
    readable: list[Path] = []
    listed: list[Path] = []
    for key in ("stdlib", "platstdlib"):
        folder = Path(sysconfig.get_path(key))
        listed.append(folder)
        readable += [
            p for p in _entries(folder) if p.name not in ("site-packages", "dist-packages")
        ]
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        if origin.name != "__init__.py":
            readable.append(origin)
            continue
        package = origin.parent
        listed.append(package.parent)
        if name != "sklearn":
            readable.append(package)
            continue
        listed.append(package)
        readable += [p for p in _entries(package) if p.name != "datasets"]
        code = [p for p in _entries(package / "datasets") if p.suffix in (".py", ".so")]
        readable += [*code, package / "datasets" / "__pycache__"]
        listed.append(package / "datasets")
    sites = dict.fromkeys(listed)
    readable += [p for site in sites for p in site.glob("*.libs")]
    readable += map(Path, _READABLE_SYSTEM_FILES)
    return [p for p in dict.fromkeys(readable) if p.exists()], list(sites)


def hidden_paths() -> list[Path]:
    """Return scikit-learn's data folders, which `bwrap` must hide."""
    spec = importlib.util.find_spec("sklearn")
    datasets = Path(spec.origin).parent / "datasets"
    return [datasets / name for name in ("data", "images", "tests")]


def landlock_ruleset() -> int:
    """Return a descriptor of the rules: read `readable_paths`, write /dev/null, nothing else."""
    abi = landlock_abi()
    file_rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    rules = _RulesetAttr(file_rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _call(_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    readable, listed = readable_paths()
    for path in readable:
        rights = _READ_FILE | _READ_DIR if path.is_dir() else _READ_FILE
        _add_rule(ruleset, path, rights)
    for path in listed:
        _add_rule(ruleset, path, _READ_DIR)
    _add_rule(ruleset, Path("/dev/null"), _READ_FILE | _WRITE_FILE)
    return ruleset


def set_no_new_privileges() -> None:
    """Allow seccomp and Landlock without root, for this process and its children."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def hide_from_ptrace() -> None:
    """Prevent processes of the same user from reading this process's memory in /proc."""
    _prctl(_PR_SET_DUMPABLE, 0)


def enter_namespaces() -> bool:
    """Move this process to new user, network and IPC namespaces; return False if refused.

    A PID namespace is not needed: a program can neither fork nor signal.
    """
    flags = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC
    return _libc().unshare(ctypes.c_int(flags)) == 0


def die_with_parent() -> None:
    """Request SIGKILL when the thread that forked this process ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_resources(memory_mib: int, cpu_seconds: float) -> None:
    """Set hard limits on address space, CPU seconds (rounded up, plus one), files and writes."""
    seconds = math.ceil(cpu_seconds) + 1
    limits = {
        "RLIMIT_AS": (memory_mib << 20, memory_mib << 20),
        "RLIMIT_CPU": (seconds, seconds + 1),
        "RLIMIT_FSIZE": (0, 0),
        "RLIMIT_NOFILE": (MAX_OPEN_FILES, MAX_OPEN_FILES),
        "RLIMIT_CORE": (0, 0),
    }
    for name, (soft, hard) in limits.items():
        number = getattr(resource, name)
        highest = resource.getrlimit(number)[1]
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        try:
            resource.setrlimit(number, (soft, hard))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            if sys.platform == "linux":
                raise
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # first to be killed


def drop_capabilities() -> None:
    """Drop every capability; root keeps only its uid."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc().capset(header, (ctypes.c_uint32 * 6)()))


def restrict_files(ruleset: int) -> None:
    """Apply a Landlock ruleset to this process irrevocably."""
    _call(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), 0)


def restrict_system_calls(program: bytes) -> None:
    """Apply a seccomp filter (`seccomp.program`) to this process irrevocably."""
    code = _SockFprog(len(program) // 8, program)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(code))


def is_filter_supported() -> bool:
    """Return True on Linux with a processor that the seccomp filter supports."""
    return sys.platform == "linux" and platform.machine() in seccomp.AUDIT_ARCH


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _add_rule(ruleset: int, path: Path, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _PathBeneathAttr(rights, parent)
        _call(_LANDLOCK_ADD, ctypes.c_int(ruleset), 1, ctypes.byref(rule), 0)
    finally:
        os.close(parent)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _call(number: int, *arguments: object) -> int:
    return _check(_libc().syscall(ctypes.c_long(number), *arguments))


def _prctl(option: int, argument: int, pointer: object = 0) -> None:
    zero = ctypes.c_ulong(0)
    pointer = pointer or zero
    _check(_libc().prctl(option, ctypes.c_ulong(argument), pointer, zero, zero))
