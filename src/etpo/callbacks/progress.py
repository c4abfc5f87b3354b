"""Print one line per iteration, and the progress of a long iteration."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer

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
    """Print a line per iteration, and the progress after `QUIET_SECONDS` without a line.

    An iteration's line is printed and logged when its checkpoint and its logs are written: a run
    that is stopped after a line continues with the next iteration.
    """

    def __init__(self) -> None:
        self.started = 0.0
        self.number = 0  # of the iteration of `line`, from 1
        self.line: str | None = None  # not printed yet
        self.printed = float("-inf")  # time of the last line

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()
        if trainer.is_global_zero:
            self.connect(trainer, self.show)

    def connect(self, trainer: Trainer, show: Callable[[str, int, int], None] | None) -> None:
        """Call `show` for parts of rollouts and scores that are finished."""
        trainer.datamodule.on_progress = show
        if hasattr(trainer.datamodule.environment, "on_score"):
            trainer.datamodule.environment.on_score = show and partial(show, "scoring")

    def show(self, stage: str, done: int, total: int) -> None:
        """Print that `done` of `total` parts of a stage are finished, if it is time."""
        if time.perf_counter() - self.printed > QUIET_SECONDS:
            seconds = time.perf_counter() - self.started
            self.print(f"  {stage} {done}/{total}, {seconds:.0f} s")

    def print(self, line: str) -> None:
        """Write a line to standard output at once."""
        print(line, flush=True)
        self.printed = time.perf_counter()

    def print_iteration(self) -> None:
        """Print and log the line of a completed iteration, if it is not printed yet."""
        if self.line is not None:
            self.print(self.line)
            log.info(self.line)
            self.line = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.print_iteration()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self.show("updating", batch_idx + 1, trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        if trainer.is_global_zero:
            self.number = trainer.current_epoch + 1
            self.line = iteration_line(self.number, trainer.max_epochs, metrics, seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.number:  # counted after checkpoint and logs
            self.print_iteration()
        self.connect(trainer, None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)


def iteration_line(number: int, total: int, metrics: dict[str, float], seconds: float) -> str:
    """Return iteration `number` (from 1) of `total` in one line, without missing metrics."""
    parts = [f"iteration {number:>{len(str(total))}}/{total}"]
    parts += [f"{label} {metrics[name]:{form}}" for label, name, form in COLUMNS if name in metrics]
    return "  ".join([*parts, f"{seconds:.1f} s"])
