"""A run has its own folder; a refused one leaves none and changes none."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch

from etpo import train
from etpo.run_folder import RunFolder, claimed, remove_made, save_config


@pytest.fixture
def once(command, small_run, monkeypatch, tmp_path):
    """once(*overrides): a run of one iteration in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    small = ("trainer.max_epochs=1", "environment.dataset=iris", "environment.sandbox.workers=1")
    return lambda *overrides: command(train.main, *small_run, *small, *overrides)


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_runs_of_one_second_get_folders_of_their_own(once, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_and_judge", lambda cfg: save_config(folder_of(cfg), cfg))
    for _ in range(2):
        assert once().status == 0
    assert len(list((tmp_path / "logs" / "train" / "runs").iterdir())) == 2


def folder_of(cfg) -> Path:
    return Path(cfg.paths.output_dir)


def test_only_what_this_process_made_is_removed(tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    RunFolder.made = ()
    remove_made()
    assert folder.exists()
    other = tmp_path / "runs" / "other"
    other.mkdir()
    RunFolder.made = (folder, folder.parent)
    remove_made()
    assert not folder.exists()
    assert other.exists()


@pytest.mark.parametrize(
    "override",
    [
        *("algorithm.beta=-1", "nope=1", "model.name_or_path=nowhere", "environment.dataset=nope"),
        *("rollout.max_new_tokens=5000", "ckpt_path=nowhere", "seed=[", "algorithm.gamma=${nope}"),
    ],
)
@pytest.mark.parametrize("folder", [(), ("hydra.run.dir=deep/down",)])
def test_a_refused_run_leaves_no_folder(once, tmp_path, override, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ended = once(override, *folder)
    assert ended.status == 2, ended.err
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_results_is_left_alone(once, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.csv").write_text("iteration\n0\n")
    before = content(tmp_path)
    for override in ("seed=1", "algorithm.beta=-1", "nope=1"):
        ended = once(override, "hydra.run.dir=run")
        assert ended.status == 2
        assert ended.err.count("\n") == 1
        assert content(tmp_path) == before
    assert "hydra.run.dir" in once("hydra.run.dir=run").err


def test_a_folder_that_another_process_runs_in_is_refused(once, tmp_path):
    (tmp_path / "run").mkdir()
    with claimed(tmp_path / "run") as mine:
        assert mine
        ended = once("hydra.run.dir=run")
    assert ended.status == 2
    assert "another process" in ended.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize("arguments", [("hydra.run.dir=file/run",), ("-m", "seed=0,1", "study=s")])
def test_a_folder_that_is_a_file_is_one_line(once, tmp_path, arguments):
    (tmp_path / "file").write_text("")
    (tmp_path / "logs").write_text("")
    ended = once(*reversed(arguments)) if arguments[0] != "-m" else once(*arguments)
    assert ended.status == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("writer", ["metrics.csv", "last.ckpt", "credit.html", "summary.json"])
def test_a_full_disk_is_one_line(once, tmp_path, monkeypatch, writer):
    replace = os.replace

    def full(source, target):
        if str(target).endswith(writer):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    ended = once("hydra.run.dir=run", "environment.n_splits=1", "rollout.max_new_tokens=8")
    assert ended.status == 1, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert writer in line
    assert "No space left" in line
    assert "Traceback" not in ended.err
    assert not list(tmp_path.rglob("*.part"))


def test_what_a_resumed_run_is_given_acts_or_is_refused(once, command, tmp_path):
    ended = once('hydra.run.dir="lr=0.1 (a)"')
    assert ended.status == 0, ended.err
    run = tmp_path / "lr=0.1 (a)"
    last = run / "checkpoints" / "last.ckpt"
    first = torch.load(last)
    assert [g["lr"] for g in first["optimizer_states"][0]["param_groups"]] == pytest.approx(
        [5e-4 * 5 / 6, 1e-3 * 5 / 6]  # one of three steps to a half
    )
    before = content(run)
    for override, word in (
        ("seed=9", "seed"),
        ("trainer.max_epochs=0", "max_epochs"),
        ("algorithm.optimizer={_target_:torch.optim.SGD}", "algorithm.optimizer"),
        ("algorithm.optimizer.amsgrad=true", "optimizer.amsgrad"),
        ("+algorithm.optimizer.amsgrad=true", "algorithm.optimizer"),
        ("critic=full", "critic"),
        ("algorithm=reinforce", "algorithm._target_"),
        ("model.name_or_path=other", "model.name_or_path"),
        ("hydra.run.dir=elsewhere", "hydra.run.dir"),
    ):
        ended = command(train.main, f'ckpt_path="{run}"', override)
        assert ended.status == 2, override
        assert word in ended.err
        assert ended.err.count("\n") == 1
        assert content(run) == before, override
    ended = command(
        train.main,
        f'++ckpt_path="{last}"',
        *("trainer.max_epochs=2", "algorithm.policy_lr=0.0", "environment.dataset=balance_scale"),
        "algorithm.optimizer.weight_decay=0.25",
    )
    assert ended.status == 0, ended.err
    groups = torch.load(last)["optimizer_states"][0]["param_groups"]
    assert [g["lr"] for g in groups] == pytest.approx([0.0, 1e-3 * 4 / 6])
    assert [g["weight_decay"] for g in groups] == [0.25, 0.25]
    # no score and no best of iris
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if line["iteration"] == 1]
    assert summary["best_reward"] == max(rewards)


@pytest.mark.parametrize(
    ("override", "status"),
    [
        ("+trainer.limit_train_batches=1", "stopped"),
        ("+trainer.max_steps=1", "stopped"),
        ("+trainer.fast_dev_run=true", "stopped"),
        ("rollout.update_epochs=1", "finished"),
    ],
)
def test_finished_means_that_all_iterations_ran(once, tmp_path, override, status):
    override = override.replace("+trainer", "++trainer")
    ended = once("hydra.run.dir=run", "rollout.max_new_tokens=8", override)
    assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == status
