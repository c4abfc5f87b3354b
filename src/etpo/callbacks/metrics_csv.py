"""`metrics.csv`: one row per iteration, in the run's folder."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from etpo.files import read_rows, write_rows


class LoggedMetrics(Callback):
    """Base class of callbacks that need only the metrics logged in the current iteration."""

    before: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = dict(trainer.callback_metrics)

    def logged(self, trainer: Trainer) -> dict[str, float]:
        """Return these metrics by name; Lightning keeps values that were not logged again."""
        current = trainer.callback_metrics.items()
        return {name: v.item() for name, v in current if v is not self.before.get(name)}


class MetricsCSV(LoggedMetrics):
    """Write `folder/metrics.csv`: iteration (from 0), step, then the iteration's metrics by name.

    A callback, not a logger: Lightning calls loggers after the checkpoint is written, and a run
    that is killed in between would be resumed without that row. Callbacks that log must come before
    this one. Floats are written exactly. A resumed run replaces the rows of its iterations. `step`
    is the number of the iteration's last optimizer step, from 0.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / "metrics.csv"
        self.rows: list[dict[str, str]] | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if self.rows is None:
            self.rows = read_rows(self.file, trainer.current_epoch)
        row = {"iteration": str(trainer.current_epoch), "step": str(trainer.global_step - 1)}
        row |= {name: repr(value) for name, value in self.logged(trainer).items()}
        self.rows.append(row)
        write_rows(self.file, self.rows)
