"""Every action of a run, as a line of `episodes.jsonl`."""

import json
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from etpo.callbacks.ranks import gather
from etpo.files import append_lines


class EpisodeLog(Callback):
    """Appends the iteration's records to `folder/episodes.jsonl`, one JSON object per action.

    Keys: iteration (from 0), the fields of `etpo.rollout.types.Record`, and rank where there are
    several. A resumed run first cuts the file back to the iterations before the restored one.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / "episodes.jsonl"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.file.exists():
            cut_back(self.file, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = gather(trainer.datamodule.rollout.records)
        if not trainer.is_global_zero:
            return
        lines = []
        for rank, records in enumerate(ranks):
            for record in records:
                line = {"iteration": trainer.current_epoch, **record._asdict()}
                if len(ranks) > 1:
                    line["rank"] = rank
                lines.append(json.dumps(line) + "\n")
        append_lines(self.file, lines)


def cut_back(file: Path, iteration: int) -> None:
    """Keeps the lines before the first that is of `iteration` or later or was not fully written."""
    end = 0
    with file.open("rb+") as lines:
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["iteration"] >= iteration:
                break
            end += len(line)
        lines.truncate(end)
