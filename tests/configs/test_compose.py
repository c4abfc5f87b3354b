"""Composes every YAML under conf/ in its place."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from etpo.config import CONF, check_overrides, study_arguments
from etpo.errors import ConfigError

GROUPS = sorted(
    str(path.relative_to(CONF).with_suffix(""))
    for path in CONF.rglob("*.yaml")
    if path.parent not in (CONF, CONF / "hydra", CONF / "paths")
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
        module, _, attribute = target.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute) or get_class(target)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.bta=1", "algorithm.bta"),
        ("model=gpt5", "model/gpt5"),
        ("seed=[", "no viable alternative"),
        ("hydra/launcher=cluster", "basic"),
        ("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs"),  # the basic one has none
    ],
)
def test_unknown_keys_and_options_are_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        check_overrides("train", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sweeps_and_hydra_overrides_pass_the_check():
    check_overrides(
        "train", ["-m", "seed=0,1", "algorithm.beta=choice(0.1,0.2)", "hydra.run.dir=x"]
    )
    first = check_overrides("train", ["-m", "experiment=glob(token_*)"])
    assert first.algorithm.critic_loss == "mse"
    with pytest.raises(ConfigError, match="nope"):
        check_overrides("train", ["-m", "nope=0,1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.beta=interval(0.1,0.2)", "hydra/sweeper=tpe"),
        ("hydra.sweeper.params.seed=0,1", "one value"),
    ],
)
def test_sweeps_that_the_sweeper_does_not_take_are_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_overrides("train", ["-m", override])
    assert str(caught.value).startswith(override)


def test_intervals_are_optunas():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    interval = "algorithm.beta=tag(log,interval(0.25,0.5))"
    assert check_overrides("train", ["-m", "hydra/sweeper=tpe", interval]).algorithm.beta == 0.25


@pytest.mark.parametrize(
    "arguments",
    [["-m", "seed=0,1"], ["seed=0,1", "-m"], ["experiment=plain", "--multirun", "seed=0,1"]],
)
def test_the_flag_of_a_multirun_may_stand_anywhere(arguments):
    assert study_arguments(arguments)[0] == "--multirun"


def test_a_multirun_gets_the_same_study_whatever_the_order():
    studies = {
        study_arguments(a)[-1]
        for a in (["-m", "seed=0,1", "model=tiny"], ["model=tiny", "seed=0,1", "-m"])
    }
    assert len(studies) == 1
    assert studies.pop().startswith("study=")
    assert study_arguments(["-m", "study=mine"]) == ["--multirun", "study=mine"]


def test_the_launcher_is_no_part_of_a_studys_name():
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    name = study_arguments(["-m", "seed=0,1"])[-1]
    assert study_arguments(["-m", "seed=0,1", *parallel])[-1] == name
    assert study_arguments(["-m", "seed=0,2", *parallel])[-1] != name


@pytest.mark.parametrize(
    ("overrides", "environment", "model"),
    [
        ([], "tic_tac_toe", "tiny"),
        (["environment.dataset=csv", "environment.path=a/my.csv"], "my", "tiny"),
        (["environment=household"], "etpo/Household-v0", "tiny"),
        (["environment=textarena"], "FrozenLake-v0-train", "tiny"),
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
