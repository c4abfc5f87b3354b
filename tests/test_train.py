"""What `etpo-train` leaves in a run's folder and prints, on the tasks and modes that it offers."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch

from etpo import train

SUMMARY_KEYS = {
    *("status", "algorithm", "environment", "dataset", "data_hash", "model", "seed", "sandbox"),
    *("iterations", "env_steps", "action_tokens", "cache_hits"),
    *("first_mean_reward", "last_mean_reward", "last_greedy_reward", "best_reward"),
    *("held_out_auc", "valid_rate_first", "valid_rate_last", "kl_to_reference_last"),
    *("tokens_per_second", "wall_seconds", "peak_memory_mib", "versions"),
    "last_metrics",
}
ONE_ITERATION = (
    "trainer.max_epochs=1",
    "rollout.num_envs=4",
    "rollout.actions_per_iteration=16",
    "rollout.minibatch_size=16",
    "rollout.update_epochs=1",
    "rollout.max_new_tokens=48",
    "model.temperature=0.5",
    "environment.n_splits=1",
)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def episodes_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def metrics_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_run_leaves_its_files_and_nothing_beside_its_folder(finished_run):
    folder = finished_run.folder
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        *(".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"),
        *("metrics.csv", "summary.json", "episodes.jsonl", "learning_curve.png", "train.log"),
        *("credit.jsonl", "credit.html", "lock"),
        *("best_action.py", "best_action_data.csv"),
        *("checkpoints/last.ckpt", "checkpoints/best.ckpt"),
    }
    cwd = folder.parents[3]
    assert folder == cwd / "logs" / "train" / "runs" / folder.name
    assert [path.name for path in cwd.iterdir()] == ["logs"]


def test_metrics_have_a_row_per_iteration_that_agrees_with_the_episodes(finished_run):
    rows, episodes = metrics_of(finished_run.folder), episodes_of(finished_run.folder)
    assert [row["iteration"] for row in rows] == ["0", "1", "2"]
    names = set(rows[0]) - {"iteration", "step"}
    assert {name.partition("/")[0] for name in names} == {"rollout", "train", "val", "time"}
    assert len(episodes) == 3 * 16
    for number, row in enumerate(rows):
        empty = {name for name in names if not row[name]}
        assert empty == ({"rollout/replay_ratio"} if number == 0 else set())
        assert all(math.isfinite(float(row[name])) for name in names - empty)
        taken = [line for line in episodes if line["iteration"] == number]
        rewards = [line["reward"] for line in taken]
        assert [line["env"] for line in taken] == [0, 1, 2, 3] * 4
        assert float(row["rollout/reward"]) == pytest.approx(fmean(rewards), abs=1e-6)
        assert float(row["rollout/best_reward"]) == pytest.approx(max(rewards), abs=1e-6)
        assert float(row["rollout/valid_rate"]) == fmean(line["error"] is None for line in taken)
    for line in episodes:
        assert set(line) == {
            *("iteration", "env", "attempt", "prompt", "action", "reward", "error", "cached"),
            "length_limited",
            "observation",
        }
        assert (line["reward"] == -1) == (line["error"] is not None)
        assert "build_model" in line["prompt"]


def test_the_summary_agrees_with_metrics_and_episodes(finished_run):
    folder = finished_run.folder
    summary, rows, episodes = summary_of(folder), metrics_of(folder), episodes_of(folder)
    assert set(summary) == SUMMARY_KEYS
    identity = ("status", "algorithm", "environment", "dataset", "seed", "iterations", "env_steps")
    assert [summary[key] for key in identity] == [
        *("finished", "etpo", "data_science", "tic_tac_toe", 0, 3, 48)
    ]
    assert summary["cache_hits"] == sum(line["cached"] for line in episodes)
    assert summary["best_reward"] == max(line["reward"] for line in episodes)
    for key, row, name in (
        ("first_mean_reward", rows[0], "rollout/reward"),
        ("last_mean_reward", rows[-1], "rollout/reward"),
        ("valid_rate_first", rows[0], "rollout/valid_rate"),
        ("valid_rate_last", rows[-1], "rollout/valid_rate"),
        ("last_greedy_reward", rows[-1], "val/reward"),
        ("kl_to_reference_last", rows[-1], "rollout/kl_to_reference"),
    ):
        assert summary[key] == float(row[name]), key
    tokens = sum(float(row["rollout/action_tokens"]) * 16 for row in rows)
    assert summary["action_tokens"] == pytest.approx(tokens)
    for key in ("tokens_per_second", "wall_seconds", "peak_memory_mib"):
        assert summary[key] > 0, key
    assert summary["versions"]["torch"] == torch.__version__


def test_checkpoints_are_of_the_last_and_of_the_best_iteration(finished_run):
    rewards = [float(row["val/reward"]) for row in metrics_of(finished_run.folder)]
    checkpoints = finished_run.folder / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt")["epoch"] == 2
    assert torch.load(checkpoints / "best.ckpt")["epoch"] == rewards.index(max(rewards))


def test_the_learning_curve_is_a_picture(finished_run):
    image = (finished_run.folder / "learning_curve.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(image[start : start + 4]) for start in (16, 20))
    assert 600 <= width <= 3000
    assert 400 <= height <= 3000
    assert len(image) > 10_000  # not blank


def test_a_line_per_iteration_is_printed_and_logged(finished_run):
    printed = [line for line in finished_run.out.splitlines() if line.startswith("iteration ")]
    assert [line.split()[1] for line in printed] == ["1/3", "2/3", "3/3"]
    for line, row in zip(printed, metrics_of(finished_run.folder), strict=True):
        words = line.split()
        assert words[words.index("reward") + 1] == f"{float(row['rollout/reward']):.3f}"
        assert {"valid", "KL", "tokens/s"} <= set(words)
    logged = (finished_run.folder / "train.log").read_text().splitlines()
    # a record starts with date and time
    assert [line.split(" ", 2)[2] for line in logged if " iteration " in line] == printed


def test_the_closing_says_where_things_are(finished_run):
    closing = finished_run.out.partition("iteration 3/3")[2]
    assert "Finished after 3 iterations, 48 actions" in closing
    named = [Path(word) for word in closing.split() if word.startswith(str(finished_run.folder))]
    assert all(path.exists() for path in named)
    assert {path.name for path in named} == {
        *("metrics.csv", "learning_curve.png", "best_action.py", "episodes.jsonl", "credit.html"),
        "last.ckpt",
    }


def test_the_best_action_runs_by_itself(finished_run, tmp_path):
    for name in ("best_action.py", "best_action_data.csv"):
        shutil.copy(finished_run.folder / name, tmp_path)
    assert "etpo" not in (tmp_path / "best_action.py").read_text()
    printed = subprocess.run(
        [sys.executable, "-I", tmp_path / "best_action.py"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    held_out_auc = summary_of(finished_run.folder)["held_out_auc"]
    assert float(printed.rpartition(":")[2]) == pytest.approx(held_out_auc, abs=1e-6)


def test_a_multirun_finds_its_cells_again(command, repeatable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ("rollout.actions_per_iteration=4", "rollout.minibatch_size=4")
    sweep = ("seed=0,1", *ONE_ITERATION[:2], *overrides, *ONE_ITERATION[4:])
    found = []
    for arguments, skipped in ((sweep, 0), (reversed(sweep), 2)):
        ended = command(train.main, "-m", *arguments)
        assert ended.status == 0, ended.err
        assert ended.out.count("was finished before") == skipped
        cells = {path.parent for path in tmp_path.rglob("summary.json")}
        found.append({cell: (summary_of(cell)["seed"], repeatable(cell)) for cell in cells})
    assert found[0] == found[1]
    assert sorted(seed for seed, _ in found[0].values()) == [0, 1]
    (study,) = (tmp_path / "logs" / "train" / "multiruns").iterdir()
    assert {cell.parent for cell in found[0]} == {study}


def run_once(command, folder: Path, *overrides: object) -> tuple[dict, str]:
    """The summary of a run of one iteration, in which something worked, and what it printed."""
    ended = command(train.main, *ONE_ITERATION, *overrides, f"hydra.run.dir={folder}")
    assert ended.status == 0, ended.err
    summary = summary_of(folder)
    assert (summary["status"], summary["iterations"], summary["env_steps"]) == ("finished", 1, 16)
    assert 0.5 < summary["best_reward"] <= 1
    assert (folder / "best_action.py").exists()
    return summary, ended.out


def test_a_csv_file_is_a_task(command, data_dir, tmp_path):
    path = data_dir / "credit_g.csv"
    summary, _ = run_once(command, tmp_path, "environment.dataset=csv", f"environment.path={path}")
    assert 0.5 < summary["held_out_auc"] < 1
    assert len((tmp_path / "best_action_data.csv").read_text().splitlines()) == 1 + 1000


@pytest.mark.slow
def test_improving_balance_scale(command, tmp_path):
    """With `mode=improve` a success does not end the episode: its score is in the next prompt."""
    overrides = ("dataset=balance_scale", "mode=improve", "max_attempts=2")
    summary, _ = run_once(command, tmp_path, *(f"environment.{o}" for o in overrides))
    assert summary["held_out_auc"] is not None
    episodes = episodes_of(tmp_path)
    assert [line["attempt"] for line in episodes] == ([1] * 4 + [2] * 4) * 2
    followed = [(a, b) for a, b in zip(episodes, episodes[4:], strict=False) if b["attempt"] == 2]
    improved = [(a, b) for a, b in followed if a["error"] is None]
    assert improved
    assert all(f"{a['reward']:.3f}" in b["prompt"] for a, b in improved)


def test_the_papers_protocol_holds_no_rows_out(command, tmp_path):
    summary, printed = run_once(command, tmp_path, "environment.protocol=paper")
    assert summary["held_out_auc"] is None
    assert "held-out" not in printed
    with (tmp_path / "best_action_data.csv").open(newline="") as lines:
        assert {row["split"] for row in csv.DictReader(lines)} == {"reward"}


def running_in_group(group: int) -> list[str]:
    listing = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    return [row[-1] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@pytest.mark.slow
def test_two_processes_on_a_cpu(start_train, small_run, tmp_path):
    overrides = ("trainer=ddp_cpu", "trainer.max_epochs=2", "environment.sandbox.workers=1")
    process = start_train(tmp_path, *small_run, *overrides, "hydra.run.dir=run")
    try:
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    deadline = time.monotonic() + 20
    while group := running_in_group(process.pid):  # the other process may end a little later
        assert time.monotonic() < deadline, group
        time.sleep(0.1)
    assert [line.split()[1] for line in out.splitlines() if line.startswith("iteration ")] == [
        *("1/2", "2/2")
    ]
    summary, episodes = summary_of(tmp_path / "run"), episodes_of(tmp_path / "run")
    assert (summary["status"], summary["iterations"], summary["env_steps"]) == ("finished", 2, 32)
    assert [(line["iteration"], line["rank"]) for line in episodes] == [
        (iteration, rank) for iteration in (0, 1) for rank in (0, 1) for _ in range(8)
    ]
    actions = [[line["action"] for line in episodes if line["rank"] == rank] for rank in (0, 1)]
    assert actions[0] != actions[1]
    credit = (tmp_path / "run" / "credit.jsonl").read_text().splitlines()
    # eight actions of the first process, and the one that is followed
    assert [json.loads(line)["iteration"] for line in credit] == [0] * 9 + [1] * 9
    texts = ["".join(json.loads(line)["text"]) for line in credit[:8]]
    assert sorted(texts) == sorted(actions[0][:8])
    rewards = [line["reward"] for line in episodes[:16]]
    assert summary["first_mean_reward"] == pytest.approx(fmean(rewards), abs=1e-6)
