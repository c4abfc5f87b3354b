"""The filter, run by a small interpreter of classic BPF, for both processors."""

import errno
import struct

import pytest

from etpo_sandbox import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
THREAD_FLAGS = 0x003D0F00  # what the C library passes to clone for a thread
# numbers from the kernel's tables, per processor
NUMBERS = {
    "x86_64": {"read": 0, "mmap": 9, "socket": 41, "clone": 56, "execve": 59, "kill": 62,
               "fcntl": 72, "chmod": 90, "ptrace": 101, "openat": 257, "prlimit64": 302,
               "clone3": 435, "unknown": 9999},
    "aarch64": {"read": 63, "mmap": 222, "socket": 198, "clone": 220, "execve": 221, "kill": 129,
                "fcntl": 25, "chmod": 53, "ptrace": 117, "openat": 56, "prlimit64": 261,
                "clone3": 435, "unknown": 9999},
}  # fmt: skip


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the filter returns for one system call."""
    arguments = (*arguments, *[0] * (6 - len(arguments)))
    arch = seccomp.AUDIT_ARCH[machine] if arch is None else arch
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    code = list(struct.iter_unpack("HBBI", seccomp.program(machine)))
    accumulator = position = 0
    while True:
        operation, if_true, if_false, operand = code[position]
        position += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif operation == 0x54:
            accumulator &= operand
        elif operation == 0x15:
            position += if_true if accumulator == operand else if_false
        elif operation == 0x06:
            return operand


@pytest.mark.parametrize("machine", NUMBERS)
def test_verdicts(machine: str) -> None:
    number = NUMBERS[machine]
    for name in ("read", "mmap", "openat"):
        assert verdict(machine, number[name]) == ALLOW, name
    for name in ("socket", "execve", "kill", "chmod", "ptrace", "unknown"):
        assert verdict(machine, number[name]) == EPERM, name
    assert verdict(machine, number["clone3"]) == ENOSYS


@pytest.mark.parametrize("machine", NUMBERS)
def test_verdicts_that_depend_on_arguments(machine: str) -> None:
    number = NUMBERS[machine]
    new_user, signal_child = 0x10000000, 17
    assert verdict(machine, number["clone"], THREAD_FLAGS) == ALLOW
    assert verdict(machine, number["clone"], signal_child) == EPERM
    assert verdict(machine, number["clone"], THREAD_FLAGS | new_user) == EPERM
    assert verdict(machine, number["fcntl"], 3, 1) == ALLOW  # F_GETFD
    assert verdict(machine, number["fcntl"], 3, 1030) == ALLOW  # F_DUPFD_CLOEXEC
    assert verdict(machine, number["fcntl"], 3, 8, 1234) == EPERM  # F_SETOWN
    assert verdict(machine, number["prlimit64"], 0, 9, 0, 4096) == ALLOW  # read its own
    assert verdict(machine, number["prlimit64"], 1234, 9, 0, 4096) == EPERM
    assert verdict(machine, number["prlimit64"], 0, 9, 4096, 0) == EPERM
    assert verdict(machine, number["prlimit64"], 0, 9, 1 << 40, 0) == EPERM


def test_other_processor_modes_are_refused() -> None:
    assert verdict("x86_64", 11, arch=0x40000003) == KILL  # execve of 32-bit x86
    assert verdict("x86_64", 0x40000000 + 41) == EPERM  # socket of x32
