"""Callbacks of `etpo-sft`: lines of progress, and checkpoints."""

import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from etpo.callbacks.metrics_csv import MetricsCSV

QUIET_SECONDS = 30.0


class FitProgress(Callback):
    """Print the loss of a step every `QUIET_SECONDS`, and a line with the means of an epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = self.printed = time.perf_counter()

    def line(self, trainer: Trainer, *parts: str) -> None:
        """Print the epoch, `parts` and the seconds so far."""
        self.printed = time.perf_counter()
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        print("  ".join([epoch, *parts, f"{self.printed - self.started:.0f} s"]), flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.perf_counter() - self.printed > QUIET_SECONDS:
            step = f"step {batch_idx + 1}/{trainer.num_training_batches}"
            self.line(trainer, step, f"loss {float(outputs['loss']):.3f}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics, names = trainer.callback_metrics, {"loss": "train/loss", "validation": "val/loss"}
        parts = [f"{n} {float(metrics[key]):.3f}" for n, key in names.items() if key in metrics]
        self.line(trainer, *parts)


def callbacks_of(cfg: DictConfig, validates: bool) -> list[Callback]:
    """Return the callbacks of a run: checkpoints come last."""
    folder = Path(cfg.paths.output_dir)
    common = {
        "dirpath": folder / "checkpoints",
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    callbacks: list[Callback] = [FitProgress(), MetricsCSV(str(folder))]
    if validates:
        options = {"monitor": "val/loss", "save_weights_only": True}
        options["every_n_epochs"] = cfg.trainer.check_val_every_n_epoch
        callbacks.append(ModelCheckpoint(filename="best", **options, **common))
    return [*callbacks, ModelCheckpoint(filename="last", **common)]
