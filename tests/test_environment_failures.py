"""Whole runs of an environment that sends what it may not, fails or never answers."""

import json
import os
import signal
import time

import pytest
import torch

from etpo import train

TASK = """
import itertools, os, time
import gymnasium
from etpo.environments.text_env import AnyText

numbers = itertools.count()
steps = itertools.count()


class Task(gymnasium.Env):
    action_space = observation_space = AnyText()

    def __init__(self, kind):
        self.kind, self.number = kind, next(numbers)
        if kind == "moves":
            os.chdir("/")
        if kind == "hangs when made":
            print("hangs", flush=True)
            time.sleep(600)

    def reset(self, *, seed=None, options=None):
        return "go", {}

    def step(self, action):
        step = next(steps)
        if self.kind == "nan later" and step >= 6:  # 4 sampled, 2 greedy
            return "", float("nan"), True, False, {}
        if self.kind in ("hangs", "hangs and fails") and self.number == 1:
            print("hangs", flush=True)
            time.sleep(600)
        if self.kind == "hangs in rank 1" and os.environ.get("LOCAL_RANK") == "1":
            time.sleep(600)
        if self.kind in ("hangs and fails", "fails", "hangs in rank 1"):
            raise RuntimeError("server gone")
        if self.kind == "odd":
            return b"go", True, 1, None or 0, {"error": {"code": ValueError("bad")}, "cached": 0}
        return "go", 0.5, True, False, {}


gymnasium.register("Task-v0", entry_point=Task)
"""


@pytest.fixture
def arguments(checkpoint, tmp_path, monkeypatch):
    """arguments(kind): of a small run of the task in `tmp_path`."""
    module = f"task_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)  # in this process
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), path])))

    def of(kind):
        return [
            "environment=gymnasium",
            f"environment.id={module}:Task-v0",
            f"+environment.kwargs.kind={kind}",
            "model=causal_lm",
            f"model.name_or_path={checkpoint('llama')}",
            "model.max_prompt_tokens=100",
            "trainer.max_epochs=2",
            "rollout.num_envs=2",
            "rollout.actions_per_iteration=4",
            "rollout.minibatch_size=4",
            "rollout.update_epochs=1",
            "rollout.validation_steps=1",
            "rollout.max_new_tokens=4",
            f"paths.log_dir={tmp_path}/logs",
        ]

    return of


def test_a_reward_that_is_no_number_leaves_the_last_checkpoint(command, arguments, tmp_path):
    run = tmp_path / "run"
    ended = command(train.main, *arguments("nan later"), f"hydra.run.dir={run}")
    assert ended.status == 2
    (line,) = [line for line in ended.err.splitlines() if "error" in line]
    assert "environment.id=" in line
    assert "reward=nan" in line
    assert "Traceback" not in ended.err
    last = torch.load(run / "checkpoints" / "last.ckpt")
    assert last["epoch"] == 0
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())
    assert len((run / "episodes.jsonl").read_text().splitlines()) == 4


def test_odd_but_clear_values_are_logged_and_go_on(command, arguments, tmp_path):
    run = tmp_path / "run"
    ended = command(train.main, *arguments("odd"), f"hydra.run.dir={run}", "trainer.max_epochs=1")
    assert ended.status == 0, ended.err
    records = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert [record["reward"] for record in records] == [1.0] * 4
    assert records[0]["error"] == "{'code': ValueError('bad')}"
    ended = command(train.main, f"ckpt_path={run}/checkpoints/last.ckpt", "trainer.max_epochs=2")
    assert ended.status == 0, ended.err
    assert len((run / "episodes.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
def test_a_cell_that_fails_or_moves_away_stops_no_other(command, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = [a for a in arguments("x") if "kind" not in a and "log_dir" not in a]
    ended = command(
        train.main,
        "-m",
        *kinds,
        "+environment.kwargs.kind=moves,fails,pays",
        "study=s",
        "trainer.max_epochs=1",
    )
    assert ended.status == 1
    cells = sorted(cell.parent for cell in tmp_path.rglob("study_config.json"))
    assert len(cells) == 3
    assert [(cell / "summary.json").exists() for cell in cells].count(True) == 2
    (failed,) = tmp_path.rglob("failed.txt")
    line, _, traceback = failed.read_text().partition("\n")
    assert "copy 0: step() raised RuntimeError: server gone" in line
    assert 'raise RuntimeError("server gone")' in traceback


def ended_within(process, seconds, number=None):
    """Exit status, output and errors after `number` is sent once the environment hangs."""
    try:
        if number is not None:
            for line in process.stdout:
                if line.startswith("hangs"):
                    break
            time.sleep(0.3)
            process.send_signal(number)
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_failure_ends_the_process_though_another_copy_hangs(
    start_train, arguments, tmp_path, groups
):
    process = start_train(
        tmp_path, *arguments("hangs and fails"), f"rollout.pipeline_groups={groups}"
    )
    status, out, err = ended_within(process, 120)
    assert status == 2, out + err
    assert "copy 0: step() raised RuntimeError: server gone" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_failure_ends_the_other_processes(start_train, arguments, tmp_path):
    process = start_train(
        tmp_path, *arguments("hangs in rank 1"), "trainer=ddp_cpu", "rollout.minibatch_size=2"
    )
    status, out, err = ended_within(process, 120)  # the pipes are open while the other one lives
    assert status == 2, out + err
    assert "server gone" in err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hangs", "hangs when made"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_ends_a_run_that_waits_for_a_copy(
    start_train, arguments, tmp_path, kind, groups, number, expected
):
    process = start_train(
        tmp_path,
        *arguments(kind),
        f"rollout.pipeline_groups={groups}",
        f"hydra.run.dir={tmp_path}/run",
    )
    status, out, err = ended_within(process, 30, number)
    assert status == expected, out + err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_failed_cell_that_hangs_stops_no_other_and_not_the_end(start_train, arguments, tmp_path):
    kinds = [a for a in arguments("x") if "kind" not in a]
    process = start_train(
        tmp_path, "-m", *kinds, "+environment.kwargs.kind=hangs and fails,pays", "study=s"
    )
    status, out, err = ended_within(process, 120)
    assert status == 1, out + err
    assert len(list(tmp_path.rglob("failed.txt"))) == 1
    assert len(list(tmp_path.rglob("summary.json"))) == 1
