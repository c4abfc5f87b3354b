"""System-call filter of a confined program, as a classic BPF program for seccomp.

An allow list: other calls fail with EPERM. A program can start threads but not processes. Sockets,
signals to other processes, ioctl, prctl, mounts and writes to the file system fail.
Numbers: Linux `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`.
"""

import errno
import platform
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}

# fmt: off
ALLOWED = {  # name: (x86-64, aarch64)
    # input and output on open descriptors
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "lseek": (8, 62), "close": (3, 57), "dup": (32, 23), "dup3": (292, 24), "ppoll": (271, 73),
    "pselect6": (270, 72),
    # files, which Landlock restricts
    "openat": (257, 56), "faccessat": (269, 48), "faccessat2": (439, 439), "fstat": (5, 80),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "fadvise64": (221, 223),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214),
    # threads
    "membarrier": (324, 283), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "getcpu": (309, 168),
    # own signals, clocks and timers
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "getitimer": (36, 102), "setitimer": (38, 103),
    # information about this process and the machine
    "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163), "getrandom": (318, 278),
    "sysinfo": (99, 179), "uname": (63, 160), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getpgid": (121, 155), "getsid": (124, 156), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150),
    # end of a thread and of the process
    "exit": (60, 93), "exit_group": (231, 94),
}
ALLOWED_X86_64 = {  # older calls that x86-64 keeps
    "open": 2, "stat": 4, "lstat": 6, "poll": 7, "access": 21, "select": 23, "dup2": 33,
    "pause": 34, "alarm": 37, "readlink": 89, "getpgrp": 111, "time": 201,
}
# fmt: on
CLONE = (56, 220)
CLONE3 = (435, 435)
FCNTL = (72, 25)
PRLIMIT64 = (302, 261)

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020080  # NEWUSER NEWPID NEWNET NEWIPC NEWUTS NEWCGROUP NEWNS NEWTIME
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; F_SETOWN would send signals
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)

_LOAD, _AND, _JUMP_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data
_MASK = 0xFFFFFFFF

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def program(machine: str | None = None) -> bytes:
    """Return the filter as an array of `struct sock_filter` for `machine` (default: this one).

    Raises KeyError for a processor other than x86_64 and aarch64.
    """
    machine = machine or platform.machine()
    column = _COLUMN[machine]
    numbers = [pair[column] for pair in ALLOWED.values()]
    if machine == "x86_64":
        numbers += ALLOWED_X86_64.values()
    denied = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for number in numbers:
        code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # clone3 hides its flags in memory: without it the C library falls back to clone
    code += [(_JUMP_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    thread = (_low(0), _CLONE_THREAD | _CLONE_NAMESPACES, (_CLONE_THREAD,))
    code += _allow_if(CLONE[column], [thread])
    code += _allow_if(FCNTL[column], [(_low(1), _MASK, _FCNTL_COMMANDS)])
    own_limits_read_only = [(offset, _MASK, (0,)) for offset in (_low(0), _low(2), _low(2) + 4)]
    code += _allow_if(PRLIMIT64[column], own_limits_read_only)
    code.append(denied)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _low(argument: int) -> int:
    """Return the offset of the low half of a system call's argument (little endian)."""
    return 16 + 8 * argument


def _allow_if(number: int, conditions: list[tuple[int, int, tuple[int, ...]]]) -> list[Instruction]:
    """Allow a call if, for each (offset, mask, values), the masked word is one of `values`."""
    body: list[Instruction] = []
    for offset, mask, values in conditions:
        body += [(_LOAD, 0, 0, offset), (_AND, 0, 0, mask)]
        body += [(_JUMP_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        body.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    body.append((_RETURN, 0, 0, _ALLOW))
    return [(_JUMP_EQUAL, 0, len(body), number), *body]
