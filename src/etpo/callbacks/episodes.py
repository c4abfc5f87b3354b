"""Log every action of a run to `episodes.jsonl`."""

import json
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from etpo.callbacks.ranks import gather
from etpo.files import append_lines


class EpisodeLog(Callback):
    """Append the iteration's records to `folder/episodes.jsonl`, one JSON object per action.

    Keys: iteration (from 0), the fields of `etpo.rollout.types.Record` and, with several ranks,
    rank. A resumed run truncates the file to the iterations before the restored one.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / "episodes.jsonl"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.file.exists():
            truncate_lines(self.file, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = gather(trainer.datamodule.rollout.records)
        if not trainer.is_global_zero:
            return
        lines = []
        for rank, records in enumerate(ranks):
            own = {"rank": rank} if len(ranks) > 1 else {}
            for record in records:
                line = {"iteration": trainer.current_epoch} | record._asdict() | own
                lines.append(json.dumps(line) + "\n")
        append_lines(self.file, lines)


def truncate_lines(file: Path, iteration: int) -> None:
    """Cut the file before the first line that is incomplete or of `iteration` or later."""
    end = 0
    with file.open("rb+") as lines:
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["iteration"] >= iteration:
                break
            end += len(line)
        lines.truncate(end)
