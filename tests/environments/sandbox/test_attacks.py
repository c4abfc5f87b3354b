"""No attack works, and after each one the sandbox scores a good program as before."""

import os
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from etpo.environments.sandbox import Outcome, Sandbox, confinement, seccomp

from .attacks import ATTACKS, ENDLESS, attack
from .conftest import N_FEATURES, N_TEST, assert_scores_well, make_splits

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


def children_of(sandbox: Sandbox) -> list[str]:
    """The processes that the sandbox's servers have forked."""
    tasks = [Path(f"/proc/{server.process.pid}/task") for server in sandbox._servers]
    return [
        pid
        for task in tasks
        for file in task.glob("*/children")
        for pid in file.read_text().split()
    ]
