"""Servers never outlive their training process, are replaced when they die, and run anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from etpo_sandbox import Sandbox, SandboxError, client, confinement, pool

from .conftest import GOOD_PROGRAM, assert_scores_well, make_splits

TRAINER = """
import json, os, signal, sys, time
import numpy as np
from etpo_sandbox import Sandbox, Split

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
x = np.random.RandomState(0).normal(size=(60, 3))
split = Split(x, (x[:, 0] > 0).astype(int), x)
sandbox = Sandbox(workers=2, deadline={deadline})
sandbox.start()
if {fork}:
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
print(json.dumps([server.process.pid for server in sandbox._servers]), flush=True)
outcomes = sandbox.run([{program!r}], [split], 2, 0)
print(json.dumps([sandbox.level, outcomes[0].error]), flush=True)
"""
BUSY = (
    GOOD_PROGRAM
    + """
import time

def fit(x_train, y_train, build_model=build_model):
    end = time.process_time() + 0.6
    while time.process_time() < end: pass
    return build_model(x_train, y_train)

build_model = fit
"""
)
ENDLESS = "while True: pass"


def start_trainer(
    program: str = GOOD_PROGRAM, deadline: float = 30, fork: bool = False, prefix: tuple = ()
) -> subprocess.Popen:
    code = TRAINER.format(program=program, deadline=deadline, fork=fork)
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in file.read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def assert_all_end(pids: list[int]) -> None:
    for _ in range(100):
        if not any(map(is_running, pids)):
            return
        time.sleep(0.05)
    raise AssertionError([pid for pid in pids if is_running(pid)])


@pytest.mark.parametrize(
    ("number", "fork"),
    [
        (signal.SIGKILL, False),
        pytest.param(signal.SIGKILL, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_no_process_outlives_the_trainer(number: signal.Signals, fork: bool) -> None:
    """Also where a process forked from the trainer still holds the servers' sockets."""
    trainer = start_trainer(ENDLESS, fork=fork)
    servers = json.loads(trainer.stdout.readline())
    time.sleep(0.3)
    below = [pid for server in servers for pid in [server, *descendants(server)]]
    assert len(below) == 3
    if fork:
        os.kill(trainer.pid, number)
    else:
        os.killpg(trainer.pid, number)
    assert_all_end(below)
    assert trainer.wait(timeout=10) != 0
    if fork:
        os.killpg(trainer.pid, signal.SIGKILL)
    trainer.communicate()


def test_close_and_garbage_end_the_servers() -> None:
    closed, dropped = Sandbox(workers=1), Sandbox(workers=1)
    closed.start()
    dropped.start()
    processes = [sandbox._servers[0].process for sandbox in (closed, dropped)]
    closed.start()
    assert closed._servers[0].process is processes[0]
    closed.close()
    closed.close()
    del dropped
    assert [process.poll() for process in processes] == [0, 0]


def test_a_dead_server_is_replaced_once(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox._servers[0].process.kill()
    assert_scores_well(sandbox)

    def fail(*_: object) -> None:
        raise client.ServerError("a sandbox server ended")

    splits, _ = make_splits()
    with monkeypatch.context() as patch:
        patch.setattr(client.Server, "run", fail)
        with pytest.raises(RuntimeError, match="a sandbox server ended"):
            sandbox.run([GOOD_PROGRAM], splits, 2, 0)
    assert_scores_well(sandbox)


@pytest.mark.slow
def test_a_server_killed_at_work_is_replaced(sandbox: Sandbox) -> None:
    splits, _ = make_splits(n_splits=1)
    first = sandbox._servers[0].process
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {first.pid}"])
    (outcome,) = sandbox.run([BUSY], splits, 2, 0)
    killer.wait()
    assert outcome.error is None
    assert first.poll() is not None


def test_an_error_of_the_caller_closes_the_sandbox(sandbox: Sandbox) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    splits, _ = make_splits()
    process = sandbox._servers[0].process
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sandbox.run([GOOD_PROGRAM, *[ENDLESS] * 5], splits, 2, 0, interrupt)
    assert time.monotonic() - started < 4
    assert process.poll() is not None
    assert_scores_well(sandbox)


def test_servers_see_nothing_of_this_process(sandbox: Sandbox) -> None:
    pid = sandbox._servers[0].process.pid
    assert b"secret-in-the-environment" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert os.getsid(pid) == pid
    assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()


def test_five_splits_take_little_time(sandbox: Sandbox) -> None:
    random = np.random.RandomState(0)
    x = random.normal(size=(580, 9))
    y = (x[:, 0] > 0).astype(int)
    splits = [client.Split(x[:290], y[:290], x[290:])] * 5
    best = np.inf
    for _ in range(3):
        started = time.perf_counter()
        sandbox.run([GOOD_PROGRAM], splits, 2, 0)
        best = min(best, time.perf_counter() - started)
    assert best < 1.0  # 0.08 on an idle machine


def test_without_landlock_bubblewrap_or_a_clear_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "landlock_abi", lambda: 0)
    monkeypatch.setattr(pool.shutil, "which", lambda name: None)
    for level in ("full", "bubblewrap"):
        with pytest.raises(SandboxError, match=r"level=unsafe"):
            Sandbox(level=level)
    monkeypatch.setattr(pool.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert Sandbox(level="full").level == "bubblewrap"


@pytest.mark.slow
def test_bubblewrap_runs_programs_or_is_refused() -> None:
    if shutil.which("bwrap") is None:
        with pytest.raises(SandboxError, match="level=bubblewrap needs bwrap"):
            Sandbox(level="bubblewrap")
        return
    with Sandbox(level="bubblewrap", workers=1) as sandbox:
        assert_scores_well(sandbox)


def test_self_test_finds_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_command", unconfined(client._command))
    with pytest.raises(SandboxError, match=r"level=full does not hold .*a program can read_file"):
        Sandbox(workers=1).start()


def unconfined(command: object) -> object:
    return lambda level, settings: command("unsafe", settings | {"level": "unsafe"})


def test_unsafe_level_warns(caplog: pytest.LogCaptureFixture) -> None:
    with Sandbox(level="unsafe", workers=1) as sandbox:
        assert sandbox.level == "unsafe"
        assert "without protection" in caplog.text
        assert_scores_well(sandbox)


@pytest.mark.slow
def test_runs_where_user_namespaces_are_refused() -> None:
    limit = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    assert finish(prefix=("unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh"))


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="root alone can become another user")
def test_runs_without_privileges() -> None:
    """As user 65534; the one capability it keeps lets it reach an interpreter under /root."""
    capabilities = "-all,+dac_read_search"
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    prefix += (f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}")
    assert finish(prefix=prefix)


def finish(prefix: tuple[str, ...]) -> bool:
    """Whether a trainer that is started by `prefix` scores a program at level full."""
    output, errors = start_trainer(prefix=prefix).communicate(timeout=60)
    assert output, errors
    return json.loads(output.splitlines()[-1]) == ["full", None]


@pytest.mark.slow
def test_a_stopped_trainer_blames_no_program() -> None:
    trainer = start_trainer(BUSY, deadline=1.5)
    trainer.stdout.readline()
    time.sleep(0.2)
    os.kill(trainer.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(trainer.pid, signal.SIGCONT)
    output, errors = trainer.communicate(timeout=60)
    assert json.loads(output) == ["full", None], errors


@pytest.mark.slow
def test_a_loaded_machine_blames_no_program() -> None:
    """With many more busy processes than cores, a program near its deadline still finishes."""
    splits, _ = make_splits(n_splits=1)
    load = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(6 * (os.cpu_count() or 1))
    ]
    try:
        with Sandbox(workers=2, deadline=1.2) as sandbox:
            started = time.monotonic()
            outcomes = sandbox.run([BUSY, BUSY + "\n"], splits, 2, 0)
            assert time.monotonic() - started > 1.2
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert [outcome.error for outcome in outcomes] == [None, None]
