"""Log actions and results to W&B and TensorBoard, in addition to the metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from etpo.callbacks.best_action import FILES
from etpo.errors import ConfigError, reason
from etpo.rollout.types import Record
from etpo.studies.tables import markdown_table

COLUMNS = ("iteration", *Record._fields[:-1])  # without the observation


def wandb_runs(loggers: Sequence[Logger]) -> list[Any]:
    """Return the runs of W&B's loggers; dummies on ranks other than zero."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def start_tracking(loggers: Sequence[Logger]) -> None:
    """Start W&B's runs; raise ConfigError without a login, with a bad key, without a network."""
    own = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if own:
        wandb.finish()  # a failed run of a multirun may have left one open
    for logger in own:
        logger._wandb_init.pop("anonymous", None)  # deprecated, Lightning always passes it
    try:
        wandb_runs(own)
    except (wandb.Error, ValueError, OSError, TimeoutError) as error:
        raise ConfigError(
            f"logger=wandb: {reason(error)} (logger.wandb.offline=true needs no account and no "
            "network; `wandb login` stores a key)"
        ) from error


class Tracking(Callback):
    """Log the first `num_actions` actions of every `every_n_iterations`-th iteration as a table.

    `env_steps`, the actions sampled so far, is the horizontal axis of all metrics in W&B.
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
            rows = [[trainer.current_epoch, *record[:-1]] for record in records]
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    table = wandb.Table(list(COLUMNS), rows)
                    logger.experiment.log({"actions": table}, commit=False)
                elif isinstance(logger, TensorBoardLogger):
                    text = "\n".join(markdown_table(COLUMNS, rows))
                    logger.experiment.add_text("actions", text, trainer.global_step)

    def add_env_steps(self, trainer: Trainer) -> None:
        """Add `env_steps` to the next row of metrics."""
        steps = (trainer.current_epoch + 1) * trainer.datamodule.actions_per_iteration
        for run in wandb_runs(trainer.loggers):
            run.log({"env_steps": steps}, commit=False)


def track_results(loggers: Sequence[Logger], summary: dict[str, Any], folder: Path) -> None:
    """Log `summary.json`, the credit page, and the best action as an artifact to W&B."""
    page, script_data = folder / "credit.html", folder / "best_action_data.csv"
    for run in wandb_runs(loggers):
        run.summary.update({f"summary/{key}": value for key, value in summary.items()})
        if page.exists():
            html = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
            run.log({"credit": html} | {k: v for k, v in summary.items() if k == "env_steps"})
        for file in (folder / name for name in FILES if (folder / name).exists()):
            artifact = wandb.Artifact(f"best_action-{run.id}", type="action")
            artifact.add_file(str(file))
            if file.suffix == ".py" and script_data.exists():
                artifact.add_file(str(script_data))
            run.log_artifact(artifact)
