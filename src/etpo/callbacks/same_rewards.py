"""Reset best rewards when a run is resumed with other data."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

# Callbacks whose state compares rewards of several iterations.
COMPARING = ("BestAction", "ModelCheckpoint", "EarlyStopping")


class SameRewards(Callback):
    """Drop the best reward of a resumed run if its rewards now depend on something else.

    key: identifies what rewards depend on besides the action: data, splits, limits.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def state_dict(self) -> dict[str, Any]:
        return {"key": self.key}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint["callbacks"]
        if states.get(self.state_key, {"key": self.key})["key"] == self.key:
            return
        for name in [name for name in states if name.startswith(COMPARING)]:
            del states[name]
        if "RunSummary" in states:
            states["RunSummary"]["numbers"]["best_reward"] = None
