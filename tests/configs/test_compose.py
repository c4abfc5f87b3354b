"""Composes every YAML under conf/ in its place."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from etpo import train
from etpo.config import CONF, IGNORED_KEYS

from ..composed import composed as composed_command

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
GROUPS = sorted(
    str(path.relative_to(CONF).with_suffix(""))
    for path in CONF.rglob("*.yaml")
    if path.parent not in (CONF, CONF / "hydra", CONF / "hydra" / "job_logging", CONF / "paths")
)
# options that extend a plugin of the extra `sweep`
PLUGINS = {
    "hydra/launcher/slurm": "hydra_plugins.hydra_submitit_launcher",
    "hydra/sweeper/tpe": "hydra_plugins.hydra_optuna_sweeper",
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def targets(node):
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node._target_
        for key in node:
            if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                yield from targets(node[key])


@pytest.mark.parametrize("option", GROUPS)
def test_every_option_composes_and_names_what_exists(option):
    if option in PLUGINS:
        pytest.importorskip(PLUGINS[option])
    group, _, name = option.rpartition("/")
    cfg = composed(f"{group}={name}")
    found = list(targets(cfg))
    assert found
    for target in found:
        assert callable(get_object(target))


@pytest.fixture
def refused(command, monkeypatch, tmp_path):
    """refused(*arguments): the line with which `etpo-train` ends."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        ended = command(train.main, *arguments)
        assert ended.status == 2, ended.err
        assert ended.err.count("\n") == 1
        return ended.err

    return call


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.bta=1", "algorithm.bta"),
        ("model=gpt5", "model/gpt5"),
        ("seed=[", "seed=["),
        ("hydra/launcher=cluster", "basic"),
        ("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs"),  # the basic one has none
    ],
)
def test_unknown_keys_and_options_are_one_line(override, message, refused):
    assert message in refused(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nope=0,1", "nope"),
        ("algorithm.beta=interval(0.1,0.2)", "hydra/sweeper=tpe"),
        ("hydra.sweeper.params.seed=0,1", "hydra.sweeper.params.seed"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_one_line(override, message, refused):
    assert message in refused("-m", override)


def test_intervals_are_optunas():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    interval = "algorithm.beta=tag(log,interval(0.25,0.5))"
    cfg = composed_command("train", ["-m", "hydra/sweeper=tpe", interval])
    assert cfg.algorithm.beta == 0.25


@pytest.fixture
def study_of(command, monkeypatch, tmp_path):
    """study_of(*arguments): the name of the study of a multirun whose jobs do nothing."""
    monkeypatch.setattr(
        "etpo.studies.multirun.run_in_study", lambda cfg, run: found.append(cfg.study)
    )
    monkeypatch.chdir(tmp_path)
    found = []

    def call(*arguments):
        found.clear()
        ended = command(train.main, *arguments)
        assert ended.status == 0, ended.err
        (name,) = set(found)
        assert (tmp_path / "logs" / "train" / "multiruns" / name).is_dir()
        return name

    return call


def test_a_multirun_gets_the_same_study_whatever_the_order(study_of):
    """The flag may stand anywhere; where jobs run does not change what they are."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    name = study_of("-m", "seed=0,1", "model=tiny")
    assert study_of("model=tiny", "seed=0,1", "-m") == name
    assert study_of("model=tiny", "--multirun", "seed=0,1") == name
    assert study_of("-m", "seed=0,1", "model=tiny", "hydra.launcher._target_=" + BASIC) == name
    assert study_of("-m", "seed=0,2", "model=tiny") != name
    assert study_of("-m", "seed=0,1", "study=mine") == "mine"


def test_what_does_not_identify_a_run_names_no_folder(command, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "etpo.studies.multirun.run_in_study", lambda cfg, run: found.append(cfg.paths.output_dir)
    )
    monkeypatch.chdir(tmp_path)
    found = []
    for ignored in ([], ["environment.score_cache=a"], ["environment.sandbox.workers=1"]):
        ended = command(train.main, "-m", "seed=1", "study=s", *ignored)
        assert ended.status == 0, ended.err
    assert len(found) == 3
    assert len(set(found)) == 1
    cfg = composed_command("train", [])
    assert tuple(cfg.hydra.job.config.override_dirname.exclude_keys) == IGNORED_KEYS


@pytest.mark.parametrize(
    ("overrides", "environment", "model"),
    [
        ([], "tic_tac_toe", "tiny"),
        (["environment.dataset=csv", "environment.path=a/my.csv"], "my", "tiny"),
        (["environment=sokoban", "model=tiny"], "etpo/Sokoban-v0", "tiny"),
        (["environment=textarena", "model=tiny"], "FrozenLake-v0-train", "tiny"),
        (["environment=gymnasium", "environment.id=my:Task-v0"], "Task-v0", "tiny"),
        (["environment=token_mdp"], "TokenMDPEnv", "tiny"),
        (["model=causal_lm", "model.name_or_path=Qwen/Qwen3-0.6B"], "tic_tac_toe", "Qwen3-0.6B"),
    ],
)
def test_runs_are_named_after_environment_and_model(overrides, environment, model):
    cfg = composed("logger=wandb", "seed=3", "paths.output_dir=out", *overrides)
    assert cfg.logger.wandb.name == f"etpo {environment} {model} seed 3"
    assert cfg.callbacks.credit.title == f"{environment}, seed 3"
    curve = cfg.callbacks.learning_curve
    assert (curve.environment, curve.model) == (environment, model)
