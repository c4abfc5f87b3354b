"""Every study of sweeps/ composes, and runs from any folder on a tiny budget."""

import csv
import re
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
)
DATA_SCIENCE = "environment.n_splits=1", "environment.sandbox.workers=1"
# study -> what else makes it small
SMALLER = {
    "comparison": ["environment.dataset=tic_tac_toe"],
    "credit_scaling": ["point=l4_t1,l8_t1", "algorithm=etpo,grpo"],
    "search": ["hydra.sweeper.n_trials=2"],
}
# study of a pretrained model -> the family of the small random one that takes its place
PRETRAINED = {"agent": "smollm2"}
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


def test_every_model_of_the_study_is_run_here():
    swept = composed("train", ["-m", "sweep=models"]).hydra.sweeper.params.model
    assert swept.split(",") == list(FAMILY)


@pytest.mark.slow
@pytest.mark.parametrize("study", [study for study in STUDIES if study != "models"])
def test_a_study_runs_skips_what_is_finished_and_is_reported(
    study, command, checkpoint, tmp_path, monkeypatch
):
    needs(study)
    monkeypatch.chdir(tmp_path)
    sizes = [*DATA_SCIENCE, *SMALLER.get(study, [])]
    if study in PRETRAINED:
        folder = checkpoint(PRETRAINED[study])
        sizes = [f"model.name_or_path={folder}", "environment.group_size=2"]
    skipped = []
    for _ in range(2):
        arguments = (f"sweep={study}", *TINY_BUDGET, *sizes)
        ended = command(train.main, "-m", *arguments)
        assert ended.status == 0, ended
        skipped.append(ended.out.count("was finished before"))
    runs = int(re.search(rf"{study}: (\d+) runs finished, 0 not finished", ended.out)[1])
    assert runs > 1
    assert skipped == [0, runs]
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
        *("-m", "sweep=models", *TINY_BUDGET, *DATA_SCIENCE, "trainer=cpu"),
        "trainer.accumulate_grad_batches=1",
        *(f"model={model}", f"model.name_or_path={checkpoint(FAMILY[model])}"),
        *("model.dtype=float32", "critic.hidden_size=8"),
    )
    assert ended.status == 0, ended
    assert "multiruns/models: 1 runs finished, 0 not finished" in ended.out
