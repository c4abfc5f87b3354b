"""`learning_curve.png`: rewards and valid rate of a run."""

from pathlib import Path
from typing import Any

import pandas as pd
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from etpo.callbacks.metrics_csv import LoggedMetrics
from etpo.files import written

# the first two colours of Okabe and Ito's palette that differ in lightness too
MEAN, GREEDY = "#0072B2", "#D55E00"
METRICS = ("rollout/reward", "val/reward", "rollout/valid_rate")


class LearningCurve(LoggedMetrics):
    """Draw reward and valid rate against actions when a run ends, also for TensorBoard.

    The title of the figure is environment, model and seed.
    """

    def __init__(self, folder: str, environment: str, model: str, seed: int) -> None:
        self.folder = Path(folder)
        self.title = f"{environment}, {model}, seed {seed}"
        self.rows: list[dict[str, float]] = []  # of the completed iterations

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {name: value for name, value in self.logged(trainer).items() if name in METRICS}
        self.rows.append({"iteration": trainer.current_epoch, **row})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # without an iteration that an exception ended before its checkpoint
        rows = [row for row in self.rows if row["iteration"] < trainer.current_epoch]
        if not rows or not trainer.is_global_zero:
            return
        figure = learning_curve(rows, trainer.datamodule.actions_per_iteration, self.title)
        with written(self.folder / "learning_curve.png") as part:
            figure.savefig(part, dpi=150, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("learning_curve", figure, trainer.global_step)


def learning_curve(rows: list[dict[str, float]], actions_per_iteration: int, title: str) -> Figure:
    """Draw rewards above and the valid rate below; rows have an iteration and its `METRICS`."""
    table = pd.DataFrame(rows, columns=["iteration", *METRICS], dtype=float)
    table["actions"] = (table["iteration"] + 1) * actions_per_iteration
    figure = Figure(figsize=(7, 5), layout="constrained")
    reward, valid = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for axes, name, label, colour in (
        (reward, "rollout/reward", "sampled actions, mean", MEAN),
        (reward, "val/reward", "greedy actions, mean", GREEDY),
        (valid, "rollout/valid_rate", None, MEAN),
    ):
        line = {"color": colour, "label": label, "marker": "o", "markersize": 3}
        axes.plot("actions", name, data=table.dropna(subset=name), **line)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    reward.set(title=title, ylabel="reward")
    reward.legend(frameon=False)
    valid.set(ylabel="actions without error", ylim=(-0.03, 1.03), xlim=(0, None))
    valid.set_xlabel(f"actions ({actions_per_iteration} per iteration)")
    valid.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    valid.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    return figure
