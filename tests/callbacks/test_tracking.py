"""What W&B and TensorBoard get: read back from the files that they write."""

import csv
import json

import pytest
import wandb
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from etpo import train
from etpo.callbacks.learning_curve import LearningCurve
from etpo.callbacks.metrics_csv import MetricsCSV
from etpo.callbacks.tracking import COLUMNS, Tracking, start_tracking
from etpo.config import CONF

from .wandb_file import BLOCK, Offline, records


def test_wandb_holds_a_run_and_what_came_after_its_resumption(
    command, small_run, tmp_path, no_account
):
    folder = tmp_path / "run"
    arguments = (
        *(*small_run, "trainer.max_epochs=2", f"hydra.run.dir={folder}"),
        *("logger=wandb", "logger.wandb.log_model=true"),  # offline by WANDB_MODE
        *("logger.wandb.tags=[a,b]", "study=mine", "callbacks.tracking.every_n_iterations=2"),
        "callbacks.tracking.num_actions=3",
    )
    ended = command(train.main, *arguments)
    assert ended.status == 0, ended.err
    last = folder / "checkpoints" / "last.ckpt"
    ended = command(train.main, f"ckpt_path={last}", "trainer.max_epochs=3")
    assert ended.status == 0, ended.err

    offline = Offline(folder)
    assert len(offline.files) == 2
    assert len({run.run_id for run in offline.runs}) == 1
    for run in offline.runs:
        assert (run.project, run.run_group, run.job_type) == ("etpo", "mine", "train")
        assert list(run.tags) == ["a", "b"]
    assert offline.config["algorithm"]["beta"] == 0.02
    assert offline.config["environment"]["dataset"] == "tic_tac_toe"
    assert offline.config["trainer"]["max_epochs"] == 3

    # by actions sampled so far: 16 in each of three iterations
    assert offline.metrics["*"].step_metric == "env_steps"
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    with (folder / "metrics.csv").open(newline="") as file:
        iterations = list(csv.DictReader(file))
    assert len(iterations) == 3
    # an iteration is two rows, one of validation and one of all else, whole
    for iteration, metrics in enumerate(iterations):
        del metrics["iteration"], metrics["step"]
        if iteration == 0:
            assert metrics.pop("rollout/replay_ratio") == ""
        rows = [row for row in offline.history if row["env_steps"] == 16 * (iteration + 1)]
        rows = [row for row in rows if "credit/path" not in row]
        assert [row["epoch"] for row in rows] == [iteration] * 2
        logged = [{name: row[name] for name in metrics if name in row} for row in rows]
        assert logged[0].keys() == {"val/reward"}
        assert logged[1].keys() == metrics.keys() - {"val/reward"}
        numbers = {name: float(value) for name, value in metrics.items()}
        assert logged[0] | logged[1] == pytest.approx(numbers)
        rewards = [line["reward"] for line in lines if line["iteration"] == iteration]
        assert logged[1]["rollout/reward"] == pytest.approx(sum(rewards) / 16)

    tables = [json.loads(file.read_text()) for file in folder.rglob("actions_*.table.json")]
    assert len(tables) == 2
    for table, iteration in zip(sorted(tables, key=lambda t: t["data"][0]), (0, 2), strict=True):
        assert table["columns"] == list(COLUMNS)
        own = [line for line in lines if line["iteration"] == iteration][:3]
        assert table["data"] == [[line[name] for name in COLUMNS] for line in own]

    summary = json.loads((folder / "summary.json").read_text())
    assert {k: offline.summary[f"summary/{k}"] for k in summary} == summary
    # the page as it was at the end of each session
    pages = [row for row in offline.history if "credit/path" in row]
    assert [row["env_steps"] for row in pages] == [32, 48]
    assert all(row["credit/_type"] == "html-file" for row in pages)
    (last_page,) = folder.glob(f"wandb/offline-run-*/files/{pages[-1]['credit/path']}")
    assert last_page.read_bytes() == (folder / "credit.html").read_bytes()
    kinds = [artifact.type for artifact in offline.artifacts]
    assert {"action", "model", "run_table"} <= set(kinds)
    best = next(a for a in reversed(offline.artifacts) if a.type == "action")
    entries = {entry.path: entry.size for entry in best.manifest.contents}
    files = [f for f in folder.glob("best_action*") if f.is_file()]
    assert entries == {file.name: file.stat().st_size for file in files}


def test_a_log_that_is_not_whole_is_not_read(tmp_path, no_account):
    run = wandb.init(project="p", dir=tmp_path, settings=wandb.Settings(console="off"))
    text = "x" * 3 * BLOCK  # a record of several chunks
    run.log({"text": text})
    run.log({"number": 0.5})
    wandb.finish()
    first, second = Offline(tmp_path).history
    assert (first["text"], second["number"]) == (text, 0.5)

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    data, cut = file.read_bytes(), tmp_path / "cut.wandb"
    for size in (7, BLOCK, BLOCK + 1, 2 * BLOCK + 9, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match="the log ends"):
            records(cut)
    cut.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum"):
        records(cut)


def test_tensorboard_gets_scalars_actions_and_the_figure(tmp_path, fit):
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    callbacks = [
        MetricsCSV(str(tmp_path)),
        Tracking(2, 3),
        LearningCurve(str(tmp_path), "d", "m", 0),
    ]
    fit(callbacks, 3, loggers=[logger])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert [event.value for event in events.Scalars("val/reward")] == [0.25, 0.75, 0.5]
    assert tags["images"] == ["learning_curve"]
    texts = [
        event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("actions/text_summary")
    ]
    assert len(texts) == 2  # iterations 0 and 2
    rows = texts[1].splitlines()
    assert rows[0] == f"| {' | '.join(COLUMNS)} |"
    assert rows[2:] == [
        "| 2 | 0 | 1 | def f():<br> | a2.0.0 | 0.25 | None | False | False |",
        "| 2 | 1 | 1 | def f():<br> | a2.0.1 | 0.5 | None | False | False |",
        "| 2 | 0 | 2 | def f():<br> | a2.0.2 | 0.75 | None | False | False |",
    ]


@pytest.mark.parametrize("problem", ["no key", "bad key", "network"])
def test_what_wandb_lacks_is_one_line_before_the_model_is_loaded(
    problem, command, small_run, no_account, monkeypatch, tmp_path
):
    def refuse(*args, **kwargs):
        raise wandb.errors.CommError("Run initialization has timed out\nafter 90.0 sec.")

    loaded = []
    monkeypatch.setattr("etpo.models.policy.load_model", lambda *args: loaded.append(args))
    monkeypatch.delenv("WANDB_MODE")
    if problem == "bad key":
        monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    if problem == "network":
        monkeypatch.setattr(wandb, "init", refuse)
    ended = command(train.main, *small_run, "logger=wandb", f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert "Traceback" not in ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert "logger.wandb.offline=true" in line
    assert not loaded


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_mode_is_respected_and_nothing_is_deprecated(mode, no_account, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", mode)
    wandb.teardown()
    warned = []
    monkeypatch.setattr("wandb.termwarn", lambda text, **_: warned.append(text))
    monkeypatch.setattr("wandb.errors.term.termwarn", lambda text, **_: warned.append(text))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"paths.output_dir={tmp_path}", "logger=wandb"])
    logger = instantiate(cfg.logger.wandb)
    try:
        start_tracking([logger])
        assert wandb.run is not None
        assert wandb.run.disabled == (mode == "disabled")
        if mode == "offline":
            assert wandb.run.name == "etpo tic_tac_toe tiny seed 0"
    finally:
        wandb.finish()
    assert not warned
