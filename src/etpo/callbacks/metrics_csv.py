"""`metrics.csv`: one row per iteration, in the run's folder."""

import csv
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from etpo.files import written


class MetricsCSV(Callback):
    """Writes `folder/metrics.csv`: iteration (from 0), step, then the iteration's metrics by name.

    A callback and no logger: Lightning calls loggers after the checkpoint is written, and a run
    that is killed in between would go on without that row. What another callback logs at the end
    of an iteration is in its row if that callback comes before this one.

    Floats are written so that reading them gives the same bits. The first row of a resumed run
    cuts the file back to the iterations before it, which stay as they are written. `step` is the
    number of the iteration's last optimizer step, from 0.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / "metrics.csv"
        self.rows: list[dict[str, str]] | None = None
        self.before: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = dict(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if self.rows is None:
            self.rows = rows_before(self.file, trainer.current_epoch)
        row = {"iteration": str(trainer.current_epoch), "step": str(trainer.global_step - 1)}
        for name, value in trainer.callback_metrics.items():
            # Lightning keeps the last value of what this iteration has not logged
            if value is not self.before.get(name):
                row[name] = repr(value.item())
        self.rows.append(row)
        write_rows(self.file, self.rows)


def rows_before(file: Path, iteration: int) -> list[dict[str, str]]:
    """The rows of the iterations before `iteration`, as they are written; empty cells left out."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    rows = [{name: value for name, value in row.items() if value} for row in rows]
    return [row for row in rows if int(row["iteration"]) < iteration]


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """Replaces `file`; metrics that a row lacks are left empty."""
    names = sorted(set().union(*rows) - {"iteration", "step"})
    with written(file) as part, part.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["iteration", "step", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
