"""`learning_curve.png`: what a run learned, from its `metrics.csv`."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from etpo.callbacks.metrics_csv import rows_before

# the first two colours of Okabe and Ito's palette that differ in lightness too
MEAN, GREEDY = "#0072B2", "#D55E00"


class LearningCurve(Callback):
    """Draws reward and valid rate against actions when a run ends or is interrupted.

    TensorBoard gets the figure, too.

    environment, model, seed: name the run in the title.
    """

    def __init__(self, folder: str, environment: str, model: str, seed: int) -> None:
        self.folder = Path(folder)
        self.title = f"{environment}, {model}, seed {seed}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draw(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.draw(trainer)

    def draw(self, trainer: Trainer) -> None:
        """Writes the figure, if an iteration was completed."""
        if not trainer.is_global_zero:
            return
        rows = rows_before(self.folder / "metrics.csv", trainer.current_epoch)
        if rows:
            figure = learning_curve(rows, trainer.datamodule.actions_per_iteration, self.title)
            figure.savefig(self.folder / "learning_curve.png", dpi=150)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("learning_curve", figure, trainer.global_step)


def learning_curve(rows: list[dict[str, str]], actions_per_iteration: int, title: str) -> Figure:
    """Rewards above, valid rate below, of the rows of a `metrics.csv`."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    reward, valid = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for axes, name, label, colour in (
        (reward, "rollout/reward", "sampled actions, mean", MEAN),
        (reward, "val/reward", "greedy actions, mean", GREEDY),
        (valid, "rollout/valid_rate", None, MEAN),
    ):
        points = [
            ((int(row["iteration"]) + 1) * actions_per_iteration, float(row[name]))
            for row in rows
            if row.get(name)
        ]
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3)
    reward.set_title(title)
    reward.set_ylabel("reward")
    reward.legend(frameon=False)
    valid.set_ylabel("actions without error")
    valid.set_ylim(-0.03, 1.03)
    valid.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    valid.set_xlabel(f"actions ({actions_per_iteration} per iteration)")
    valid.set_xlim(left=0)
    valid.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (reward, valid):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    figure.align_ylabels()
    return figure
