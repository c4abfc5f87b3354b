"""Every study of sweeps/ composes, and runs from any folder on a tiny budget."""

import csv
from itertools import pairwise

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from etpo import report, train
from etpo.config import CONF

from ..composed import composed

STUDIES = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
TINY_BUDGET = (
    "seed=0",
    "trainer.max_epochs=1",
    "rollout.num_envs=2",
    "rollout.actions_per_iteration=4",
    "rollout.minibatch_size=4",
    "rollout.update_epochs=1",
    "rollout.max_new_tokens=8",
    "environment.n_splits=1",
    "environment.sandbox.workers=1",
)
# study -> its runs of one seed, and what else makes it small
RUNS = {
    "beta": (5,),
    "comparison": (10, "environment.dataset=tic_tac_toe"),
    "critic": (4,),
    "lambda": (6,),
    "search": (2, "hydra.sweeper.n_trials=2"),
}
FAMILY = {
    "qwen2.5-coder-1.5b": "qwen",
    "deepseek-coder-1.3b": "deepseek",
    "starcoder2-3b": "starcoder",
}


def needs(study: str) -> None:
    if study == "search":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")


@pytest.mark.parametrize("study", STUDIES)
def test_each_value_of_a_study_composes_and_changes_something(study):
    needs(study)
    cfg = composed("train", ["-m", f"sweep={study}"])
    assert cfg.study == study
    for key, values in cfg.hydra.sweeper.params.items():
        if key == "seed":
            continue
        sweep = OverridesParser.create().parse_override(f"{key}={values}")
        interval = sweep.is_interval_sweep()
        ends = (sweep.value().start, sweep.value().end) if interval else ()
        texts = ends or sweep.sweep_string_iterator()
        cfgs = [composed("train", [f"sweep={study}", f"{key}={v}"]) for v in texts]
        for one in cfgs:
            del one.hydra
        assert len(cfgs) > 1
        assert all(a != b for a, b in pairwise(cfgs))


def test_every_study_is_run_here():
    assert {*STUDIES} == {*RUNS, "models"}
    swept = composed("train", ["-m", "sweep=models"]).hydra.sweeper.params.model
    assert swept.split(",") == list(FAMILY)


@pytest.mark.slow
@pytest.mark.parametrize("study", RUNS)
def test_a_study_runs_skips_what_is_finished_and_is_reported(study, command, tmp_path, monkeypatch):
    needs(study)
    monkeypatch.chdir(tmp_path)
    runs, *smaller = RUNS[study]
    for skipped in (0, runs):
        ended = command(train.main, "-m", f"sweep={study}", *TINY_BUDGET, *smaller)
        assert ended.status == 0, ended
        assert ended.out.count("was finished before") == skipped
        assert f"{study}: {runs} runs finished, 0 not finished" in ended.out
    ended = command(report.main, f"study={study}")
    assert ended.status == 0, ended.err
    folder = tmp_path / "logs" / "train" / "multiruns" / study
    with (folder / "summary.csv").open(newline="") as lines:
        assert len({row["method"] for row in csv.DictReader(lines)}) == runs


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILY)
def test_models_of_random_weights_run_as_the_study_of_models(
    model, command, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ended = command(
        train.main,
        *("-m", "sweep=models", *TINY_BUDGET, "trainer=cpu", "trainer.accumulate_grad_batches=1"),
        *(f"model={model}", f"model.name_or_path={checkpoint(FAMILY[model])}"),
        *("model.dtype=float32", "critic.hidden_size=8"),
    )
    assert ended.status == 0, ended
    assert "multiruns/models: 1 runs finished, 0 not finished" in ended.out
