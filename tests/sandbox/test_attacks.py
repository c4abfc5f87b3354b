"""No attack works, and after each one the sandbox scores a good program as before."""

import os
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from etpo_sandbox import Outcome, Sandbox, confinement, seccomp

from .attacks import ATTACKS, ENDLESS, attack
from .conftest import GOOD_PROGRAM, N_FEATURES, N_TEST, assert_scores_well, make_splits

SECRET = "the labels"
FAST = """
fork subprocess system raw_clone thread_bomb surviving_threads kill_trainer kill_server
signal_through_a_socket limit_trainer become_immortal raise_limits unshare
read_passwd read_users_file list_folder trainer_environ own_environment write_new_file unlink chmod
open_descriptors bundled_data_set bundled_csv tcp unix_socket doubling_bomb terabyte
deep_recursion segmentation_fault stdout_flood exit_in_str exit_zero result_flood unknown_message
pickle_as_result patched_metric hunt_through_gc hunt_through_frames
wait_for_test_rows_before_fitting cache_across_splits
""".split()  # noqa: SIM905


def fast_first(names: Iterable[str], fast: Iterable[str]) -> list[object]:
    """All names as test parameters, those that are not in `fast` marked slow."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in names if name not in fast]
    return [*fast, *slow]


@pytest.fixture
def facts(tmp_path: Path) -> Iterator[dict[str, object]]:
    """What the attacks know: a file, one that must not appear, the trainer's pid, a port."""
    secret = tmp_path / "labels.txt"
    secret.write_text(SECRET)
    secret.chmod(0o644)
    os.utime(secret, (1000, 1000))
    column = ("x86_64", "aarch64").index(os.uname().machine)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "secret": str(secret),
            "folder": str(tmp_path),
            "witness": str(tmp_path / "witness"),
            "trainer": os.getpid(),
            "port": server.getsockname()[1],
            "clone": seccomp.CLONE[column],
            "clone3": seccomp.CLONE3[column],
            "bpf": (321, 280)[column],
            "n_test": N_TEST,
            "n_features": N_FEATURES,
        }


def run(sandbox: Sandbox, body: str) -> Outcome:
    splits, _ = make_splits()
    (outcome,) = sandbox.run([attack(body)], splits, 2, seed=0)
    return outcome


@pytest.mark.parametrize("name", fast_first(ATTACKS, FAST))
def test_attack_fails(sandbox: Sandbox, facts: dict[str, object], name: str) -> None:
    body, error = ATTACKS[name]
    affinity, priority = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)

    outcome = run(sandbox, body.format(**facts))

    if error is None:
        assert outcome.error is None
    else:
        assert re.search(error.format(**facts), str(outcome.error))
        assert "Escaped" not in str(outcome.error)
        assert len(str(outcome.error).encode()) <= 600
    secret = Path(facts["secret"])
    assert os.listdir(facts["folder"]) == ["labels.txt"]
    assert secret.read_text() == SECRET
    status = secret.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_mtime) == (0o644, os.getuid(), 1000)
    assert (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)) == (affinity, priority)
    assert_scores_well(sandbox)
    assert children_of(sandbox) == []


@pytest.mark.parametrize("name", fast_first(ENDLESS, ("c_loop", "catch_everything", "sleep")))
def test_endless_program_is_ended(hasty_sandbox: Sandbox, name: str) -> None:
    body, error = ENDLESS[name]
    outcome = run(hasty_sandbox, body)
    assert re.match(error, outcome.error)
    assert_scores_well(hasty_sandbox)
    assert children_of(hasty_sandbox) == []


def test_attacks_would_work_without_protection(facts: dict[str, object]) -> None:
    """The suite above can fail: the same programs reach their goals at `level=unsafe`."""
    worked = []
    names = ("read_users_file", "bundled_data_set", "fork", "tcp", "write_new_file", "chmod")
    with Sandbox(level="unsafe", workers=1) as unsafe:
        for name in names:
            body, _ = ATTACKS[name]
            outcome = run(unsafe, body.format(**facts))
            if "PermissionError" not in str(outcome.error):
                worked.append(name)
    assert worked == list(names)


def test_no_data_file_of_scikit_learn_is_readable() -> None:
    readable, listed = confinement.readable_paths()
    for folder in confinement.hidden_paths():
        assert folder.is_dir()
        assert not any(folder.is_relative_to(path) for path in readable)
    assert not any(path.name in ("site-packages", "dist-packages") for path in readable)
    assert not any(Path.cwd().is_relative_to(path) for path in [*readable, *listed])


# hostile programs that end at once
QUICK = """
fork subprocess posix_spawn exec raw_clone kill_trainer kill_everything ptrace leave_session unshare
read_passwd read_users_file trainer_environ write_new_file unlink poison_library bundled_data_set
tcp unix_socket terabyte deep_recursion segmentation_fault exit_in_str exit_zero short_result
pickle_as_result patched_metric cache_across_splits
""".split()  # noqa: SIM905
FAILING = (
    "def build_model(x_train, y_train):\n    return LogisticRegresion()\n",
    "def build_model(x_train, y_train):\n    return (1\n",
    "def build_model(x_train, y_train):\n    raise ValueError('no')\n",
    "def other(x_train, y_train):\n    return None\n",
)


@pytest.mark.slow
def test_a_soak_of_5000_programs_leaves_nothing_behind(facts: dict[str, object]) -> None:
    """Half of them honest, a quarter failing, a quarter hostile."""
    splits, _ = make_splits(n_splits=1)
    hostile = [attack(ATTACKS[name][0].format(**facts)) for name in QUICK]
    programs = []
    for number in range(1250):
        honest = GOOD_PROGRAM.replace("LogisticRegression()", f"LogisticRegression(C={number + 1})")
        programs += [honest, honest.replace("C=", "tol=1e-3, C=")]
        programs += [FAILING[number % len(FAILING)], hostile[number % len(hostile)]]
    before = temporary_files()
    with Sandbox(workers=2, deadline=5, memory_mib=1024) as soaked:
        sizes = []
        for start in range(0, len(programs), 500):
            outcomes = soaked.run(programs[start : start + 500], splits, 2, seed=0)
            errors = [outcome.error for outcome in outcomes]
            assert [e for i, e in enumerate(errors) if i % 4 < 2 and e is not None] == []
            assert None not in errors[2::4]
            assert not any("Escaped" in str(error) for error in errors)
            assert children_of(soaked) == []
            pids = [os.getpid(), *(server.process.pid for server in soaked._servers)]
            sizes.append([(descriptors(pid), resident_mib(pid)) for pid in pids])
    assert len(set(pids)) == 3
    for (fewest, small), (most, large) in zip(sizes[1], sizes[-1], strict=True):
        assert most <= fewest
        assert large <= small + 8
    assert os.listdir(facts["folder"]) == ["labels.txt"]
    assert temporary_files() == before


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def temporary_files() -> list[str]:
    """What lies directly in the places that every user may write to."""
    return [f"{place}/{name}" for place in ("/dev/shm", "/var/tmp") for name in os.listdir(place)]


def children_of(sandbox: Sandbox) -> list[str]:
    """The processes that the sandbox's servers have forked."""
    tasks = [Path(f"/proc/{server.process.pid}/task") for server in sandbox._servers]
    return [
        pid
        for task in tasks
        for file in task.glob("*/children")
        for pid in file.read_text().split()
    ]
