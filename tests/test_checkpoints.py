import resource

import pytest
import torch

from etpo.checkpoints import AtomicCheckpointIO
from etpo.errors import OutputError


def names(folder):
    return [file.name for file in folder.iterdir()]


def test_a_failed_write_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"value": 1}, str(path))
    assert names(path.parent) == ["last.ckpt"]

    def interrupted(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"value": 2}, str(path))
    assert io.load_checkpoint(path) == {"value": 1}
    assert names(path.parent) == ["last.ckpt"]


def test_a_full_disk_is_one_line_and_leaves_the_last_whole_checkpoint(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"value": 1}, str(path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="last.ckpt: cannot be written") as refused:
            io.save_checkpoint({"value": torch.zeros(100_000)}, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refused.value)
    assert io.load_checkpoint(path) == {"value": 1}
    assert names(tmp_path) == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="last.ckpt: cannot be written"):
        AtomicCheckpointIO().save_checkpoint({}, str(tmp_path / "file" / "last.ckpt"))
