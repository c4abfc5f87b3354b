import csv
import struct
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from etpo.callbacks.metrics_csv import MetricsCSV
from etpo.callbacks.summary import RunSummary


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def log(callback, iteration, **metrics):
    """An iteration of two steps that logs `metrics`, in double precision."""
    trainer = SimpleNamespace(
        is_global_zero=True,
        current_epoch=iteration,
        global_step=2 * iteration + 2,
        callback_metrics={},
    )
    callback.on_train_epoch_start(trainer, None)
    values = {name: torch.tensor(value, dtype=torch.double) for name, value in metrics.items()}
    trainer.callback_metrics |= values
    callback.on_train_epoch_end(trainer, None)


def test_a_row_is_iteration_step_and_the_metrics_by_name(tmp_path):
    callback = MetricsCSV(tmp_path)
    for iteration in range(2):
        log(callback, iteration, **{"val/reward": 0.5, "train/loss": 1.5, "rollout/reward": -1.0})
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "iteration,step,rollout/reward,train/loss,val/reward"
    assert rows == ["0,1,-1.0,1.5,0.5", "1,3,-1.0,1.5,0.5"]


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 123456789.123456789]
    callback = MetricsCSV(tmp_path)
    for iteration, value in enumerate(values):
        log(callback, iteration, x=value)
    written = [float(row["x"]) for row in read(tmp_path / "metrics.csv")]
    assert [struct.pack("d", x) for x in written] == [struct.pack("d", x) for x in values]


def test_a_metric_that_comes_later_leaves_earlier_rows_empty(tmp_path):
    callback = MetricsCSV(tmp_path)
    log(callback, 0, b=1.0)
    log(callback, 1, a=2.0)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["iteration,step,a,b", "0,1,,1.0", "1,3,2.0,"]


def test_a_resumed_run_keeps_what_is_before_it_and_drops_the_rest(tmp_path):
    callback = MetricsCSV(tmp_path)
    for iteration in range(3):
        log(callback, iteration, loss=iteration / 3)
    before = (tmp_path / "metrics.csv").read_bytes().splitlines(keepends=True)
    log(MetricsCSV(tmp_path), 1, loss=7.0)
    after = read(tmp_path / "metrics.csv")
    assert [row["iteration"] for row in after] == ["0", "1"]
    assert after[1]["loss"] == "7.0"
    log(MetricsCSV(tmp_path), 1, loss=1 / 3)
    assert (tmp_path / "metrics.csv").read_bytes().splitlines(keepends=True) == before[:3]


def test_a_trainer_writes_one_row_per_iteration_and_resumes(tmp_path, fit, interrupted, checkpoint):
    file = tmp_path / "metrics.csv"
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit([MetricsCSV(tmp_path), checkpoint()], 4, module=interrupted(2))
    first = file.read_bytes()
    assert first.count(b"\n") == 3
    fit([MetricsCSV(tmp_path), checkpoint()], 4, ckpt_path=last)
    assert file.read_bytes().startswith(first)
    whole = read(file)
    assert [row["iteration"] for row in whole] == ["0", "1", "2", "3"]
    assert [row["step"] for row in whole] == ["1", "3", "5", "7"]
    assert [float(row["val/reward"]) for row in whole] == [0.25, 0.75, 0.5, 0.625]
    # means of the rewards of each iteration
    assert [float(row["rollout/reward"]) for row in whole] == [-0.3125, 0.1875, 0.5, 1.0]
    assert not list(tmp_path.glob("*.part"))


def test_resuming_gives_the_file_of_an_uninterrupted_run(tmp_path, fit, interrupted, checkpoint):
    fit([MetricsCSV(tmp_path / "a"), checkpoint()], 4)
    fit([MetricsCSV(tmp_path / "b"), checkpoint()], 4, module=interrupted(1))
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit([MetricsCSV(tmp_path / "b"), checkpoint()], 4, ckpt_path=last)
    assert (tmp_path / "b/metrics.csv").read_bytes() == (tmp_path / "a/metrics.csv").read_bytes()


class Recorder(Logger):
    """What Lightning gives a logger, by step."""

    name = version = ""

    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step=None):
        self.logged.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}])
def test_a_row_holds_what_a_logger_gets(tmp_path, fit, options):
    recorder = Recorder()
    fit([RunSummary(), MetricsCSV(tmp_path)], 4, loggers=[recorder], **options)
    rows = read(tmp_path / "metrics.csv")
    assert "time/iteration_seconds" in rows[0]
    written = {
        int(row.pop("step")): {
            "epoch": float(row.pop("iteration")),
            **{name: float(value) for name, value in row.items() if value},
        }
        for row in rows
    }
    assert written == recorder.logged
    validated = ["val/reward" in logged for logged in written.values()]
    assert validated == ([False, True] * 2 if options else [True] * 4)


class EndsAfter(TorchCheckpointIO):
    """Ends the run when a checkpoint of `epoch` is written, before any logger is called."""

    def __init__(self, epoch):
        self.epoch = epoch

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path)
        if checkpoint["epoch"] == self.epoch:
            raise RuntimeError("ended")


def test_a_checkpoint_never_lies_without_its_row(tmp_path, fit, checkpoint):
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(RuntimeError, match="ended"):
        fit([MetricsCSV(tmp_path), checkpoint()], 4, plugins=[EndsAfter(1)])
    assert torch.load(last)["epoch"] == 1
    assert len(read(tmp_path / "metrics.csv")) == 2
    fit([MetricsCSV(tmp_path), checkpoint()], 4, ckpt_path=last)
    assert [row["iteration"] for row in read(tmp_path / "metrics.csv")] == ["0", "1", "2", "3"]
