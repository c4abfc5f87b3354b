"""Files are whole or as they were, and a full disk is one line."""

import errno
import os
import resource
import signal

import pytest
import torch

from etpo.checkpoints import AtomicCheckpointIO
from etpo.errors import OutputError
from etpo.files import append_lines, write_rows, write_text, written

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "summary.json"
    write_text(file, "old")

    def fill():
        with written(file) as part:
            part.write_text("half")
            raise FULL

    with pytest.raises(OutputError, match=r"summary\.json.*No space"):
        fill()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_text(file, "x"),
        lambda file: append_lines(file, ["x\n"]),
        lambda file: write_rows(file, [{"iteration": "0", "step": "0"}]),
        lambda file: AtomicCheckpointIO().save_checkpoint({}, str(file)),
    ],
)
def test_a_folder_that_is_a_file_is_one_line(tmp_path, write):
    (tmp_path / "folder").write_text("no folder")
    with pytest.raises(OutputError, match="folder/file"):
        write(tmp_path / "folder" / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_lines_are_added_whole_or_not_at_all(tmp_path):
    file = tmp_path / "episodes.jsonl"
    append_lines(file, ["a\n"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
        with pytest.raises(OutputError, match=r"episodes\.jsonl"):
            append_lines(file, ["b\n" * 100])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert file.read_text() == "a\n"


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, str(file))

    def full(*_, **__):
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="last.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"a": 2}, str(file))
    assert torch.load(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]
