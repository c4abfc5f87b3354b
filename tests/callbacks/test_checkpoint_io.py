import pytest
import torch

from etpo.callbacks.checkpoint_io import AtomicCheckpointIO


def test_a_failed_write_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"value": 1}, str(path))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]

    def interrupted(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"value": 2}, str(path))
    assert io.load_checkpoint(path) == {"value": 1}
