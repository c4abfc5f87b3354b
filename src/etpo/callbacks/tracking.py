"""Actions and results for W&B and TensorBoard, in addition to the metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from etpo.callbacks.best_action import FILES
from etpo.errors import ConfigError, reason
from etpo.rollout.types import Record

COLUMNS = ("iteration", *Record._fields)


def wandb_runs(loggers: Sequence[Logger]) -> list[Any]:
    """Return the runs of W&B's loggers; they are stand-ins on other ranks than zero."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def start_tracking(loggers: Sequence[Logger]) -> None:
    """Start the runs of W&B's loggers before a model is loaded.

    Raises ConfigError if W&B refuses: without a login, with a bad key, without a network.
    """
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        wandb.finish()  # a failed run of a multirun may have left one open
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger._wandb_init.pop("anonymous", None)  # deprecated, Lightning always passes it
    try:
        wandb_runs(loggers)
    except (wandb.Error, ValueError, OSError, TimeoutError) as error:
        raise ConfigError(
            f"logger=wandb: {reason(error)} (logger.wandb.offline=true needs no account and no "
            "network; `wandb login` stores a key)"
        ) from error


class Tracking(Callback):
    """Show sampled actions every `every_n_iterations` iterations, the first `num_actions` of each.

    W&B gets a table `actions`, and `env_steps` (actions sampled so far) as the horizontal axis of
    all its metrics; TensorBoard gets the table as text.
    """

    def __init__(self, every_n_iterations: int, num_actions: int) -> None:
        self.every_n_iterations, self.num_actions = every_n_iterations, num_actions

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for run in wandb_runs(trainer.loggers):
            run.define_metric("env_steps", hidden=True)
            run.define_metric("*", step_metric="env_steps")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add_env_steps(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.add_env_steps(trainer)
        if trainer.is_global_zero and trainer.current_epoch % self.every_n_iterations == 0:
            records = trainer.datamodule.rollout.records[: self.num_actions]
            rows = [[trainer.current_epoch, *record] for record in records]
            for logger in trainer.loggers:
                show_actions(logger, rows, trainer.global_step)

    def add_env_steps(self, trainer: Trainer) -> None:
        """Add `env_steps` to the next row of metrics."""
        steps = (trainer.current_epoch + 1) * trainer.datamodule.actions_per_iteration
        for run in wandb_runs(trainer.loggers):
            run.log({"env_steps": steps}, commit=False)


def show_actions(logger: Logger, rows: Sequence[Sequence[Any]], step: int) -> None:
    """Log a table with the columns `COLUMNS`."""
    if isinstance(logger, WandbLogger):
        logger.experiment.log({"actions": wandb.Table(list(COLUMNS), list(rows))}, commit=False)
    elif isinstance(logger, TensorBoardLogger):
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        cells = [[str(c).replace("|", "\\|").replace("\n", "<br>") for c in line] for line in lines]
        text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        logger.experiment.add_text("actions", text, step)


def track_results(loggers: Sequence[Logger], summary: dict[str, Any], folder: Path) -> None:
    """Log `summary.json`, the credit page, and the best action as an artifact to W&B."""
    for run in wandb_runs(loggers):
        run.summary.update({f"summary/{key}": value for key, value in summary.items()})
        page = folder / "credit.html"
        if page.exists():
            html = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
            steps = {key: summary[key] for key in ("env_steps",) if key in summary}
            run.log({"credit": html, **steps})
        for file in (folder / name for name in FILES if (folder / name).exists()):
            artifact = wandb.Artifact(f"best_action-{run.id}", type="action")
            artifact.add_file(str(file))
            data = file.with_name("best_action_data.csv")  # read by the script
            if file.suffix == ".py" and data.exists():
                artifact.add_file(str(data))
            run.log_artifact(artifact)
