"""How far a run is: bars on a terminal, and one line per iteration everywhere."""

import logging
import time
from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger("etpo")

# (label, metric, format) of an iteration's line
COLUMNS = (
    ("reward", "rollout/reward", "6.3f"),
    ("valid", "rollout/valid_rate", "4.0%"),
    ("greedy", "val/reward", "6.3f"),
    ("KL", "rollout/kl_to_reference", "6.3f"),
    ("tokens/s", "time/tokens_per_second", "5.0f"),
)


QUIET_SECONDS = 30.0


class RolloutProgress(Callback):
    """Prints on rank zero; without a terminal lines only.

    There a line says how far an iteration is, when the first part of the run is done and whenever
    `QUIET_SECONDS` have passed without one.

    An iteration's line comes when its checkpoint and its logs are written: a run that is stopped
    after a line goes on with the next iteration.

    A line goes to standard output from here and, as a record of the logger "etpo", to the log
    file: that logger should neither have a handler for the console nor propagate to one.
    """

    def __init__(self) -> None:
        self.console = Console()
        self.bars: Progress | None = None
        self.started = 0.0
        self.number = 0  # of the iteration that `line` tells of, from 1
        self.line: str | None = None  # not printed yet
        self.printed = float("-inf")  # when the last line was

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()
        if not trainer.is_global_zero:
            return
        if self.console.is_terminal:
            self.open(trainer)
        trainer.datamodule.on_progress = self.show
        if hasattr(trainer.datamodule.environment, "on_score"):
            trainer.datamodule.environment.on_score = partial(self.show, "scoring")

    def open(self, trainer: Trainer) -> None:
        """Shows the bars."""
        self.bars = Progress(
            TextColumn("{task.description:10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.iterations = self.bars.add_task(
            "iterations", total=trainer.max_epochs, completed=trainer.current_epoch
        )
        self.stage = self.bars.add_task("rollout", total=None)
        self.bars.start()

    def show(self, stage: str, done: int, total: int) -> None:
        """Sets the lower bar, or prints: `done` of `total` parts of a stage of the iteration."""
        if self.bars is not None:
            self.bars.update(self.stage, description=stage, completed=done, total=total)
        elif time.perf_counter() - self.printed > QUIET_SECONDS:
            seconds = time.perf_counter() - self.started
            self.print(f"  {stage} {done}/{total}, {seconds:.0f} s")

    def print(self, line: str) -> None:
        """Writes a line to standard output at once."""
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)
        self.printed = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self.show("updating", batch_idx + 1, trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        if not trainer.is_global_zero:
            return
        self.number = trainer.current_epoch + 1
        self.line = iteration_line(self.number, trainer.max_epochs, metrics, seconds)

    def tell(self) -> None:
        """Prints the line that is due, if there is one."""
        if self.line is None:
            return
        line, self.line = self.line, None
        self.print(line)
        log.info(line)
        if self.bars is not None:
            self.bars.advance(self.iterations)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell()
        self.close(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.current_epoch == self.number:  # counted after checkpoint and logs
            self.tell()
        self.close(trainer)

    def close(self, trainer: Trainer) -> None:
        """Gives the terminal back."""
        if not trainer.is_global_zero:
            return
        if self.bars is not None:
            self.bars.stop()
            self.bars = None
        trainer.datamodule.on_progress = None
        if hasattr(trainer.datamodule.environment, "on_score"):
            trainer.datamodule.environment.on_score = None


def iteration_line(number: int, total: int, metrics: dict[str, float], seconds: float) -> str:
    """Iteration `number` (from 1) of `total` in one line; metrics that are missing are left out."""
    parts = [f"iteration {number:>{len(str(total))}}/{total}"]
    parts += [f"{label} {metrics[name]:{form}}" for label, name, form in COLUMNS if name in metrics]
    return "  ".join([*parts, f"{seconds:.1f} s"])
