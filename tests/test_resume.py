"""A run that was stopped or killed and goes on ends as the one that was never interrupted."""

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning import Callback

from etpo import train


def descendants(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in file.read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_all_end(pids: list[int], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if is_running(pid)]
        time.sleep(0.05)


@contextmanager
def killed_at_the_end(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_line(process: subprocess.Popen, start: str) -> None:
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(process.stderr.read())


def counted(folder: Path) -> dict:
    """The summary without what the clock and the memory decide."""
    summary = json.loads((folder / "summary.json").read_text())
    measured = ("wall_seconds", "tokens_per_second", "peak_memory_mib")
    return {key: value for key, value in summary.items() if key not in measured}


@pytest.fixture
def resumed_as_if_uninterrupted(command, finished_run, assert_same_run):
    """Resumes the run in a folder and holds what it leaves against the uninterrupted one."""

    def resume(folder: Path, *overrides: str) -> None:
        last = folder / "checkpoints" / "last.ckpt"
        ended = command(train.main, f"ckpt_path={last}", *overrides)
        assert ended.status == 0, ended.err
        assert_same_run(folder, finished_run.folder)
        assert counted(folder) == counted(finished_run.folder)
        best, other_best = (f / "best_action.py" for f in (folder, finished_run.folder))
        assert best.read_text() == other_best.read_text()
        for name in ("credit.jsonl", "credit.html"):
            assert (folder / name).read_bytes() == (finished_run.folder / name).read_bytes(), name

    return resume


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(
    command, small_run, finished_run, resumed_as_if_uninterrupted, tmp_path
):
    """Scores that were known at the checkpoint are known after it: see `cached`."""
    lines = (finished_run.folder / "episodes.jsonl").read_text().splitlines()
    first = {json.loads(line)["action"] for line in lines[:16]}
    assert any(json.loads(line)["action"] in first for line in lines[16:]), "nothing comes again"
    ended = command(train.main, *small_run, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}")
    assert ended.status == 0, ended.err
    assert counted(tmp_path)["iterations"] == 1
    resumed_as_if_uninterrupted(tmp_path, "trainer.max_epochs=3")


@pytest.mark.parametrize(
    "seconds", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.1, 0.3, 0.6, 1.0))]
)
def test_a_killed_run_goes_on(
    seconds, start_train, small_run, resumed_as_if_uninterrupted, tmp_path
):
    process = start_train(tmp_path, *small_run, "hydra.run.dir=run")
    with killed_at_the_end(process):
        wait_for_line(process, "iteration 2/3")
        time.sleep(seconds)
        below = descendants(process.pid)
        assert below
        process.kill()
        assert process.wait(timeout=30) == -signal.SIGKILL
        assert_all_end(below)
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed_as_if_uninterrupted(tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_summary_has_one_after_it_is_resumed(
    command, small_run, resumed_as_if_uninterrupted, tmp_path
):
    """No iteration is left: the metrics are those of the checkpoint."""
    ended = command(train.main, *small_run, f"hydra.run.dir={tmp_path}")
    assert ended.status == 0, ended.err
    (tmp_path / "summary.json").unlink()
    resumed_as_if_uninterrupted(tmp_path)


@pytest.mark.slow
def test_a_line_tells_that_the_iteration_is_kept(start_train, small_run, tmp_path):
    process = start_train(tmp_path, *small_run, "hydra.run.dir=run")
    with killed_at_the_end(process):
        wait_for_line(process, "iteration 1/3")
        process.kill()
        process.wait(timeout=30)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["epoch"] == 0
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2


class InterruptBeforeTheCheckpoint(Callback):
    """Interrupts the second iteration, when its metrics are logged."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_an_iteration_without_a_checkpoint_is_not_counted(command, small_run, tmp_path):
    interrupt = f"{__name__}.{InterruptBeforeTheCheckpoint.__name__}"
    overrides = f"+callbacks.interrupt._target_={interrupt}", f"hydra.run.dir={tmp_path}"
    ended = command(train.main, *small_run, *overrides)
    assert ended.status == 130, ended.err
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["epoch"] == 0
    assert counted(tmp_path)["iterations"] == 1


SWEEP = (
    "-m",
    "seed=0,1",
    "trainer.max_epochs=9",  # longer than any wait below
    "rollout.num_envs=2",
    "rollout.actions_per_iteration=4",
    "rollout.minibatch_size=4",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line", "seconds"),
    [
        (SWEEP, "iteration 9/9", 0),  # after the last batch of the first cell
        (SWEEP, "iteration 1/9", 0.1),  # in a rollout
        (SWEEP, "iteration 1/9", 1.0),
        (("trainer.max_epochs=9",), "iteration 1/9", 0.1),
        (("trainer.max_epochs=9",), "iteration 1/9", 1.0),
    ],
)
def test_sigterm_ends_a_run_and_a_multirun(
    overrides, line, seconds, start_train, small_run, tmp_path
):
    process = start_train(tmp_path, *small_run, *overrides)
    with killed_at_the_end(process):
        wait_for_line(process, line)
        time.sleep(seconds)
        below = descendants(process.pid)
        assert below
        process.terminate()
        printed, errors = process.stdout.read(), process.stderr.read()
        assert process.wait(timeout=60) == 143, printed + errors
        assert_all_end(below)
    assert "Traceback" not in errors
    assert "Interrupted after" in printed
    (last,) = tmp_path.rglob("last.ckpt")  # of the only cell
    folder = last.parents[1]
    assert counted(folder)["status"] == "interrupted"
    assert counted(folder)["iterations"] == torch.load(last)["epoch"] + 1


@pytest.mark.parametrize("send", [os.killpg, pytest.param(os.kill, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_what_a_run_needs_to_go_on(
    send, start_train, small_run, resumed_as_if_uninterrupted, tmp_path
):
    """A terminal interrupts the whole process group; `kill -INT` the process alone."""
    folder = tmp_path / "run"
    process = start_train(tmp_path, *small_run, "hydra.run.dir=run")
    with killed_at_the_end(process):
        wait_for_line(process, "iteration 1/3")
        below = descendants(process.pid)
        assert below
        send(process.pid, signal.SIGINT)
        printed, errors = process.stdout.read(), process.stderr.read()
        assert process.wait(timeout=60) == 130, printed + errors
        assert_all_end(below)
    assert "Traceback" not in errors
    assert "Interrupted after" in printed
    assert str(folder / "checkpoints" / "last.ckpt") in printed
    summary = counted(folder)
    assert summary["status"] == "interrupted"
    last = torch.load(folder / "checkpoints" / "last.ckpt")
    assert summary["iterations"] == last["epoch"] + 1 < 3
    resumed_as_if_uninterrupted(folder)


@pytest.mark.slow
def test_every_process_resumes_with_its_replay_window(start_train, assert_same_run, tmp_path):
    sizes = ("environment=token_mdp", "model=token_mdp", "trainer=ddp_cpu", "replay.window=3")
    sizes += ("environment.time_limit=3", "rollout.minibatch_size=32", "rollout.update_epochs=2")

    def train_until(iterations: int, *arguments: str) -> None:
        with start_train(tmp_path, *arguments, f"trainer.max_epochs={iterations}") as process:
            _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error

    schedule = "schedule_iters=4"
    train_until(4, *sizes, schedule, "hydra.run.dir=whole")
    train_until(2, *sizes, schedule, "hydra.run.dir=resumed")
    last = tmp_path / "resumed" / "checkpoints" / "last.ckpt"
    windows = torch.load(last)["RolloutDataModule"]["replay"]
    assert [len(window) for window in windows] == [2, 2]
    first, second = (window[0]["actions"]["action_ids"] for window in windows)
    assert not torch.equal(first, second)
    train_until(4, f"ckpt_path={last}")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "kept"), [("trainer.max_epochs=2", True), ("environment.split_seed=1", False)]
)
def test_a_window_is_kept_unless_the_rewards_are_of_another_task(
    command, small_run, tmp_path, change, kept
):
    run = (*small_run, "rollout.max_new_tokens=16", f"hydra.run.dir={tmp_path}")
    assert command(train.main, *run, "trainer.max_epochs=1").status == 0
    last = tmp_path / "checkpoints" / "last.ckpt"
    ended = command(train.main, f"ckpt_path={last}", "trainer.max_epochs=2", change)
    assert ended.status == 0, ended.err
    with (tmp_path / "metrics.csv").open(newline="") as lines:
        ratios = [row.get("rollout/replay_ratio", "") for row in csv.DictReader(lines)]
    assert [ratio != "" for ratio in ratios] == [False, kept]
