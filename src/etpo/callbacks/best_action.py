"""The best action of a run, kept as a file that stands by itself."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from etpo.callbacks.ranks import gather
from etpo.files import write_text

FILES = ("best_action.py", "best_action.txt")


class BestAction(Callback):
    """Keeps the sampled action of the highest reward over ranks and iterations; ties: the first.

    It is written whenever it improves: by `environment.write_best_action(folder, action)` where the
    environment has that method and the action did not fail, else as text to `best_action.txt`.

    best: iteration and fields of the record (`etpo.rollout.types.Record`), or None so far.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.best: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.write(trainer.datamodule.environment)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record = max(trainer.datamodule.rollout.records, key=lambda record: record.reward)
        record = max(gather(record), key=lambda record: record.reward)
        if self.best is None or record.reward > self.best["reward"]:
            self.best = {"iteration": trainer.current_epoch, **record._asdict()}
            if trainer.is_global_zero:
                self.write(trainer.datamodule.environment)

    def write(self, environment: Any) -> None:
        """Brings the files of `folder` in line with `best`."""
        present = None
        if self.best is not None:
            action = self.best["action"]
            if self.best["error"] is None and hasattr(environment, "write_best_action"):
                environment.write_best_action(self.folder, action)
                present = "best_action.py"
            else:
                write_text(self.folder / "best_action.txt", action)
                present = "best_action.txt"
        for name in FILES:
            if name != present:
                (self.folder / name).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
