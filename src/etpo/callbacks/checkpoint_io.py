"""Checkpoints that are whole or not there."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from etpo.files import written


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: a stop at any moment leaves the last whole checkpoint.

    Lightning's own way goes through the system's temporary folder, which may lie on another file
    system, and can swallow a Ctrl-C that comes while it writes. Raises ConfigError where the file
    cannot be written, as on a full disk; a part of it does not stay.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str, storage_options: Any | None = None
    ) -> None:
        with written(Path(path)) as part, part.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch wraps what its file raises
                raise error.__context__ or error from None
            file.flush()
            os.fsync(file.fileno())
