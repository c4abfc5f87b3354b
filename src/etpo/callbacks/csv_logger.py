"""`metrics.csv`: one row per iteration, in the run's folder."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsCSVLogger(Logger):
    """Writes `folder/metrics.csv`: iteration (from 0), step, then the metrics by name.

    Lightning logs validation first and the rest at the end of the epoch: both become one row, that
    is written when it is complete; of values logged more than once in an iteration, the last one
    stays. Floats are written so that reading them gives the same bits. The first row of a resumed
    run cuts the file back to the iterations before it, which stay as they are written.
    `step` is Lightning's: the number of the iteration's last optimizer step, from 0.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.file = Path(folder) / "metrics.csv"
        self.rows: list[dict[str, str]] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return self.folder

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "epoch" not in metrics:  # single validation batches
            return
        iteration = int(metrics["epoch"])
        if self.rows is None:
            self.rows = rows_before(self.file, iteration)
        if not self.rows or self.rows[-1]["iteration"] != str(iteration):
            self.rows.append({"iteration": str(iteration)})
        values = {name: repr(value) for name, value in metrics.items() if name != "epoch"}
        self.rows[-1] |= {"step": str(step)} | values
        if any(not name.startswith("val/") for name in values):
            write_rows(self.file, self.rows)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's configuration lies in `.hydra/`."""


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
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".csv.part")
    with part.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["iteration", "step", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, file)
