"""A multirun is a study: the same command again does what is left."""

import json
import logging
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from etpo import report, train
from etpo.config import CONF
from etpo.run_folder import claimed
from etpo.studies.multirun import first_difference


@pytest.fixture
def study(command, monkeypatch, tmp_path):
    """study(*overrides): runs the study `s` with a stand-in for training, which `trained` fills.

    The stand-in fails for the seeds in `failing`. Returns how the command ended.
    """
    trained, failing = [], set()

    def stand_in(cfg):
        trained.append((cfg.seed, cfg.ckpt_path))
        if cfg.seed in failing:
            raise RuntimeError("no luck\nat all")
        folder = Path(cfg.paths.output_dir)
        (folder / "summary.json").write_text(json.dumps({"status": "finished"}))
        (folder / "metrics.csv").write_text(f"iteration,val/reward\n0,0.1\n1,0.{cfg.seed}\n")
        return float(f"0.{cfg.seed}")

    monkeypatch.setattr(train, "train_and_judge", stand_in)
    # Optuna's handler keeps the stderr of the first test that imports it
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        trained.clear()
        return command(train.main, "-m", "study=s", *overrides)

    run.trained, run.failing, run.command = trained, failing, command
    run.folder = tmp_path / "logs" / "train" / "multiruns" / "s"
    return run


def test_finished_runs_are_skipped_and_new_ones_run(study):
    ended = study("seed=1,2")
    assert ended.status == 0, ended.err
    assert study.trained == [(1, None), (2, None)]
    ended = study("seed=1,2,3", "environment.score_cache=scores.sqlite")
    assert study.trained == [(3, None)]
    assert ended.out.count("was finished before") == 2
    assert "3 runs finished, 0 not finished" in ended.out


def test_a_failed_run_stops_no_other_and_is_reported(study):
    study.failing.add(1)
    ended = study("seed=1,2")
    assert ended.status == 1
    assert study.trained == [(1, None), (2, None)]
    assert ended.err == "error: no luck\n"
    (failed,) = study.folder.glob("*/failed.txt")
    assert f"failed: {failed.relative_to(Path.cwd())}: no luck\n" in ended.out
    assert "1 runs finished, 0 not finished" in ended.out
    study.failing.clear()
    ended = study("seed=1,2")
    assert ended.status == 0, ended.err
    assert study.trained == [(1, None)]
    assert not failed.exists()


def test_bad_input_in_a_run_is_one_line(study, monkeypatch):
    monkeypatch.undo()  # the real training
    ended = study("seed=0", "environment.dataset=csv", f"hydra.sweep.dir={study.folder}")
    assert ended.status == 1
    assert ended.err.startswith("error: environment.path")
    assert ended.err.count("\n") == 1


def test_a_run_with_a_checkpoint_goes_on_from_it(study):
    study.failing.add(1)
    study("seed=1")
    (run,) = study.folder.glob("*/")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    study("seed=1")
    assert study.trained == [(1, str(run / "checkpoints" / "last.ckpt"))]


def test_a_run_that_another_process_runs_is_left_to_it(study):
    study("seed=1")
    (run,) = study.folder.glob("*/")
    (run / "summary.json").unlink()
    with claimed(run) as locked:
        assert locked
        ended = study("seed=1,2")
    assert study.trained == [(2, None)]
    assert "another process" in ended.out
    assert "1 runs finished, 1 not finished" in ended.out


def test_a_run_of_another_configuration_is_refused(study):
    """For example when the defaults changed between two sessions."""
    study("seed=1")
    (run,) = study.folder.glob("*/")
    kept = json.loads((run / "study_config.json").read_text())
    kept["algorithm"]["beta"] = 7.0
    (run / "study_config.json").write_text(json.dumps(kept))
    ended = study("seed=1")
    assert ended.status == 1
    assert study.trained == []
    assert "algorithm.beta" in ended.err
    assert (run / "summary.json").exists()


def test_the_first_difference_of_two_configurations():
    one = {"a": {"b": [1, 2], "c": None}, "d": 1}
    assert first_difference(one, one | {}) is None
    assert first_difference(one, one | {"d": 2}) == "d"
    assert first_difference(one, one | {"a": {"b": [1], "c": None}}) == "a.b"
    assert first_difference(one, one | {"e": 0}) == "e"


def test_the_command_line_takes_the_place_of_what_a_study_sweeps(study):
    ended = study("sweep=beta", "seed=7,8", "algorithm.beta=0.01")
    assert ended.status == 0, ended.err
    assert study.trained == [(7, None), (8, None)]


SEARCH = ("hydra/sweeper=tpe", "seed=range(1,1000)", "hydra.sweeper.sampler.n_startup_trials=2")


def test_a_search_maximises_and_goes_on_where_it_stopped(study):
    """After the two that TPE draws at random, trials depend on what those before them gave."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    ended = study(*SEARCH, "hydra.sweeper.n_trials=6")
    assert ended.status == 0, ended.err
    whole = list(study.trained)
    best = OmegaConf.load(study.folder / "optimization_results.yaml")
    assert best.best_value == max(float(f"0.{seed}") for seed, _ in whole)
    study(*SEARCH, "study=t", "hydra.sweeper.n_trials=4")
    first = list(study.trained)
    ended = study(*SEARCH, "study=t", "hydra.sweeper.n_trials=6")
    assert ended.out.count("was finished before") == 4
    assert first + study.trained == whole


def test_a_failed_run_stops_no_search(study):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    study(*SEARCH, "hydra.sweeper.n_trials=1")
    study.failing.add(study.trained[0][0])
    ended = study(*SEARCH, "study=t", "hydra.sweeper.n_trials=3")
    assert ended.status == 1
    assert len(study.trained) == 3
    assert "2 runs finished, 0 not finished" in ended.out


KILLED = (
    *("-m", "study=killed", "algorithm=etpo,ppo_kl", "seed=0,1,2", "environment.dataset=iris"),
    *("trainer.max_epochs=2", "rollout.num_envs=2", "rollout.actions_per_iteration=4"),
    *("rollout.minibatch_size=4", "rollout.update_epochs=1", "rollout.max_new_tokens=8"),
    *("environment.n_splits=1", "environment.sandbox.workers=1"),
)


@pytest.mark.slow
def test_a_study_killed_in_a_run_is_finished_by_the_same_command(
    start_train, command, tmp_path, monkeypatch
):
    with start_train(tmp_path, *KILLED) as process:
        try:
            begun = 0
            while begun < 4:
                line = process.stdout.readline()
                assert line, process.stderr.read()
                begun += line.startswith("iteration 1/2")
        finally:
            process.kill()
    folder = tmp_path / "logs" / "train" / "multiruns" / "killed"
    finished = [file.parent for file in folder.glob("*/summary.json")]
    assert len(finished) == 3
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in left_by(finished)}

    monkeypatch.chdir(tmp_path)
    ended = command(train.main, *KILLED)
    assert ended.status == 0, ended.err
    assert ended.out.count("was finished before") == 3
    # the fourth run goes on with its second iteration, two runs have both
    assert [ended.out.count(f"iteration {number}/2") for number in (1, 2)] == [2, 3]
    assert "6 runs finished, 0 not finished" in ended.out
    assert before == {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in left_by(finished)}

    ended = command(report.main, "study=killed")
    assert ended.status == 0, ended.err
    assert (folder / "index.html").is_file()
    assert len((folder / "summary.csv").read_text().splitlines()) == 1 + 6


def left_by(runs):
    """Return the files of finished runs, except the lock and `.hydra`."""
    files = (file for run in runs for file in run.rglob("*") if file.is_file())
    return [f for f in files if f.name != "lock" and ".hydra" not in f.parts]


def test_a_trial_that_ends_with_nan_ends_no_search(study, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    stand_in = train.train_and_judge
    values = iter([math.nan, 0.5, math.inf])
    monkeypatch.setattr(train, "train_and_judge", lambda cfg: stand_in(cfg) and next(values))
    ended = study(*SEARCH, "hydra.sweeper.n_trials=3")
    assert ended.status == 0, ended.err
    assert len(study.trained) == 3
    assert OmegaConf.load(study.folder / "optimization_results.yaml").best_value == 0.5


def test_a_search_without_a_result_is_one_line(study):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    study.failing |= set(range(1000))
    ended = study(*SEARCH, "hydra.sweeper.n_trials=2")
    assert ended.status == 1
    assert "Traceback" not in ended.err
    assert "no trial" in ended.err
    assert "0 runs finished" in ended.out


@pytest.mark.parametrize("arguments", [("seed=0,1",), SEARCH])
def test_an_unknown_metric_ends_a_study_at_its_first_run(study, monkeypatch, small_run, arguments):
    monkeypatch.undo()  # the real training
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.chdir(study.folder.parents[3])
    ended = study(*small_run, *arguments, "optimized_metric=val/rewrd", "environment.dataset=iris")
    assert ended.status == 2, ended.err
    assert ended.err.startswith("error: optimized_metric=val/rewrd")
    assert ended.err.count("\n") == 1
    for name in ("val/reward", "rollout/best_reward_so_far", "time/iteration_seconds"):
        assert name in ended.err
    assert not list(study.folder.glob("*/"))  # no run is left


FILES_OF = {
    "episodes": {"episodes.jsonl"},
    "credit": {"credit.jsonl", "credit.html"},
    "best_action": {"best_action.py", "best_action_data.csv"},
    "metrics": {"metrics.csv"},
    "learning_curve": {"learning_curve.png"},
    "best_checkpoint": {"checkpoints/best.ckpt"},
    "last_checkpoint": {"checkpoints/last.ckpt"},
}
ALL = set().union(*FILES_OF.values()) | {"summary.json", "train.log"}


def left(run):
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    return {f for f in files if not f.startswith(".hydra")} - {"lock", "study_config.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OmegaConf.load(CONF / "callbacks" / "default.yaml"), None])
def test_without_a_callback_only_its_file_is_missing(name, study, monkeypatch, small_run):
    """In a study that is started twice and a run that is trained longer; None: no callbacks."""
    monkeypatch.undo()
    monkeypatch.chdir(study.folder.parents[3])
    gone = "callbacks=null" if name is None else f"~callbacks.{name}"
    expected = {"summary.json", "train.log"} if name is None else ALL - FILES_OF.get(name, set())
    arguments = (*small_run, gone, "trainer.max_epochs=1", "environment.dataset=iris")
    ended = study(*arguments)
    assert ended.status == 0, ended.err
    (run,) = study.folder.glob("*/")
    assert left(run) == expected
    ended = study(*arguments)
    assert "was finished before" in ended.out
    assert "1 runs finished, 0 not finished" in ended.out
    if (run / "checkpoints" / "last.ckpt").exists():
        ended = study.command(train.main, f"ckpt_path={run}", "trainer.max_epochs=2")
        assert ended.status == 0, ended.err
        assert left(run) == expected
        assert json.loads((run / "summary.json").read_text())["iterations"] == 2
