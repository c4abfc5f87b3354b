"""Keep the best action of a run as a file."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from etpo.callbacks.ranks import gather
from etpo.files import write_text

FILES = ("best_action.py", "best_action.txt")


class BestAction(Callback):
    """Keep the first sampled action with the highest reward over ranks and iterations.

    The environment writes it, by `environment.write_best_action(folder, action)`, if it has this
    method and the action did not fail. Otherwise its text is written to `best_action.txt`.

    Attributes:
        best: The iteration and the fields of the action's `etpo.rollout.types.Record`, or None.
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
        """Write the file of `best`; remove other files."""
        written = None
        if self.best is not None:
            if self.best["error"] is None and hasattr(environment, "write_best_action"):
                written = "best_action.py"
                environment.write_best_action(self.folder, self.best["action"])
            else:
                written = "best_action.txt"
                write_text(self.folder / written, self.best["action"])
        for name in {*FILES} - {written}:
            (self.folder / name).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
