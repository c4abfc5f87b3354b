import csv
import struct

from etpo.callbacks.csv_logger import MetricsCSVLogger


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_validation_and_training_of_an_iteration_make_one_row(tmp_path):
    logger = MetricsCSVLogger(tmp_path)
    for iteration in range(2):
        logger.log_metrics({"epoch": iteration, "val/reward": 0.5}, step=9)
        logger.log_metrics({"epoch": iteration, "train/loss": 1.5, "rollout/reward": -1.0}, step=9)
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "iteration,step,rollout/reward,train/loss,val/reward"
    assert rows == ["0,9,-1.0,1.5,0.5", "1,9,-1.0,1.5,0.5"]


def test_a_row_is_written_only_when_it_is_complete(tmp_path):
    logger = MetricsCSVLogger(tmp_path)
    logger.log_metrics({"epoch": 0, "val/reward": 0.5}, step=1)
    assert not (tmp_path / "metrics.csv").exists()
    logger.log_metrics({"epoch": 0, "train/loss": 0.5}, step=1)
    logger.log_metrics({"epoch": 1, "val/reward": 0.5}, step=3)
    assert len(read(tmp_path / "metrics.csv")) == 1


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 123456789.123456789]
    logger = MetricsCSVLogger(tmp_path)
    for iteration, value in enumerate(values):
        logger.log_metrics({"epoch": iteration, "train/x": value}, step=iteration)
    written = [float(row["train/x"]) for row in read(tmp_path / "metrics.csv")]
    assert [struct.pack("d", x) for x in written] == [struct.pack("d", x) for x in values]


def test_a_metric_that_comes_later_leaves_earlier_rows_empty(tmp_path):
    logger = MetricsCSVLogger(tmp_path)
    logger.log_metrics({"epoch": 0, "train/b": 1.0}, step=0)
    logger.log_metrics({"epoch": 1, "train/a": 2.0}, step=1)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["iteration,step,train/a,train/b", "0,0,,1.0", "1,1,2.0,"]


def test_a_resumed_run_keeps_what_is_before_it_and_drops_the_rest(tmp_path):
    logger = MetricsCSVLogger(tmp_path)
    for iteration in range(3):
        logger.log_metrics({"epoch": iteration, "train/loss": iteration / 3}, step=iteration)
    before = (tmp_path / "metrics.csv").read_bytes().splitlines(keepends=True)
    resumed = MetricsCSVLogger(tmp_path)
    resumed.log_metrics({"epoch": 1, "val/reward": 9.0}, step=1)
    resumed.log_metrics({"epoch": 1, "train/loss": 7.0}, step=1)
    after = read(tmp_path / "metrics.csv")
    assert [row["iteration"] for row in after] == ["0", "1"]
    assert after[1]["train/loss"] == "7.0"
    again = MetricsCSVLogger(tmp_path)
    again.log_metrics({"epoch": 1, "train/loss": 1 / 3}, step=1)
    assert (tmp_path / "metrics.csv").read_bytes().splitlines(keepends=True) == before[:3]


def test_a_trainer_writes_one_row_per_iteration_and_resumes(tmp_path, fit, interrupted, checkpoint):
    file = tmp_path / "metrics.csv"
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit([checkpoint()], 4, loggers=[MetricsCSVLogger(tmp_path)], module=interrupted(2))
    first = file.read_bytes()
    assert first.count(b"\n") == 3
    fit([checkpoint()], 4, loggers=[MetricsCSVLogger(tmp_path)], ckpt_path=last)
    assert file.read_bytes().startswith(first)
    whole = read(file)
    assert [row["iteration"] for row in whole] == ["0", "1", "2", "3"]
    assert [row["step"] for row in whole] == ["1", "3", "5", "7"]
    assert [float(row["val/reward"]) for row in whole] == [0.25, 0.75, 0.5, 0.625]
    # means of the rewards of each iteration
    assert [float(row["rollout/reward"]) for row in whole] == [-0.3125, 0.1875, 0.5, 1.0]
    assert not list(tmp_path.glob("*.part"))


def test_resuming_gives_the_file_of_an_uninterrupted_run(tmp_path, fit, interrupted, checkpoint):
    fit([checkpoint()], 4, loggers=[MetricsCSVLogger(tmp_path / "a")])
    fit([checkpoint()], 4, loggers=[MetricsCSVLogger(tmp_path / "b")], module=interrupted(1))
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit([checkpoint()], 4, loggers=[MetricsCSVLogger(tmp_path / "b")], ckpt_path=last)
    assert (tmp_path / "b/metrics.csv").read_bytes() == (tmp_path / "a/metrics.csv").read_bytes()
