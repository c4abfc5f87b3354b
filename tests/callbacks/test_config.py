"""The groups conf/callbacks and conf/logger, in runs of the real Trainer."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from etpo.callbacks.metrics_csv import MetricsCSV
from etpo.config import CONF


def compose_run(folder: Path, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"paths.output_dir={folder}", *overrides])


def callbacks_of(folder: Path) -> list:
    return [instantiate(c) for c in compose_run(folder).callbacks.values()]


def loggers_of(folder: Path, *overrides: str) -> list:
    return [instantiate(c) for c in compose_run(folder, *overrides).logger.values()]


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / "checkpoints" / name)  # with `weights_only`: nothing but data


def test_the_default_callbacks_leave_the_files_of_a_run(tmp_path, fit, script_environment):
    fit(callbacks_of(tmp_path), 4, environment=script_environment)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "metrics.csv",
        "episodes.jsonl",
        "best_action.py",
        "learning_curve.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }
    # greedy rewards are 0.25, 0.75, 0.5, 0.625: the best checkpoint is that of iteration 1
    assert load(tmp_path, "best.ckpt")["epoch"] == 1
    assert load(tmp_path, "last.ckpt")["epoch"] == 3


def test_an_interruption_leaves_the_last_completed_iteration(tmp_path, fit, interrupted):
    fit(callbacks_of(tmp_path), 4, module=interrupted(3))
    assert load(tmp_path, "last.ckpt")["epoch"] == 2
    resumed = fit(callbacks_of(tmp_path), 4, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.current_epoch == 4
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
    ]
    assert load(tmp_path, "last.ckpt")["epoch"] == 3
    assert load(tmp_path, "best.ckpt")["epoch"] == 1
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines[::4]] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["last.ckpt", None])
def test_a_used_folder_keeps_two_checkpoints(tmp_path, fit, name):
    fit(callbacks_of(tmp_path), 1)
    resumed = tmp_path / "checkpoints" / name if name else None
    fit(callbacks_of(tmp_path), 2, ckpt_path=resumed)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert load(tmp_path, "last.ckpt")["epoch"] == 1


@pytest.mark.parametrize(
    ("group", "kinds"),
    [("csv", []), ("wandb", ["WandbLogger"]), ("tensorboard", ["TensorBoardLogger"])],
)
def test_a_logger_comes_beside_metrics_csv(tmp_path, group, kinds):
    cfg = compose_run(tmp_path, f"logger={group}")
    assert [type(instantiate(c)).__name__ for c in cfg.logger.values()] == kinds
    (metrics,) = (c for c in map(instantiate, cfg.callbacks.values()) if type(c) is MetricsCSV)
    assert metrics.file == tmp_path / "metrics.csv"


def test_tensorboard_writes_into_the_runs_folder(tmp_path, fit):
    fit([], 2, loggers=loggers_of(tmp_path, "logger=tensorboard"))
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_wandb_runs_offline_without_an_account(tmp_path, fit, no_account):
    import wandb

    try:
        fit([], 1, loggers=loggers_of(tmp_path, "logger=wandb", "logger.wandb.offline=true"))
        assert wandb.run.settings._offline
        assert dict(wandb.run.summary)["val/reward"] == 0.25
    finally:
        wandb.finish()
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
