"""The settings of Python and those of `conf/` have the same names and defaults."""

import dataclasses
import inspect

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from etpo.algorithms.base import OnPolicyAlgorithm
from etpo.config import CONF
from etpo.rollout.datamodule import RolloutDataModule

OPTIONS = sorted(file.stem for file in CONF.glob("algorithm/*.yaml") if file.stem != "base")
PARTS = {"_target_", "policy", "critic", "optimizer", "scheduler"}  # no settings
# options with the defaults of their class, and the settings that differ
DEFAULTS = {
    "etpo": (),
    "poad": (),
    "reinforce": (),
    "archer": ("policy_lr",),
    "gigpo": ("policy_lr",),
    "zero_shot": (),
    "reflexion": (),
}


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def settings_of(option):
    """The settings class of an option of `algorithm` and the values of the YAML."""
    cfg = composed(f"algorithm={option}").algorithm
    values = OmegaConf.to_container(cfg, resolve=True)
    algorithm = get_class(values["_target_"].rpartition(".")[0])
    return algorithm.settings_class, {k: v for k, v in values.items() if k not in PARTS}


@pytest.mark.parametrize("option", OPTIONS)
def test_yaml_has_every_setting_and_no_other(option):
    settings_class, values = settings_of(option)
    assert values.keys() == {field.name for field in dataclasses.fields(settings_class)}
    assert dataclasses.asdict(settings_class(**values)) == values


@pytest.mark.parametrize("option", DEFAULTS)
def test_yaml_has_the_defaults_of_the_class(option):
    settings_class, values = settings_of(option)
    defaults = dataclasses.asdict(settings_class())
    differing = {name for name in defaults if values[name] != defaults[name]}
    assert differing == set(DEFAULTS[option])


def test_optimizer_and_scheduler_of_the_yaml():
    cfg = composed().algorithm
    optimizer = instantiate(cfg.optimizer)
    default = OnPolicyAlgorithm(torch.nn.Identity()).optimizer
    assert (optimizer.func, optimizer.keywords) == (default.func, default.keywords)
    assert instantiate(cfg.scheduler).func is torch.optim.lr_scheduler.LinearLR


def test_yaml_has_the_defaults_of_the_data_module():
    values = OmegaConf.to_container(composed("replay=none").rollout, resolve=True)
    parameters = dict(inspect.signature(RolloutDataModule).parameters)
    del parameters["environment"], values["_target_"]
    assert values.keys() == parameters.keys()
    values["num_envs"] = None  # Python takes it from the environment
    assert values == {name: parameter.default for name, parameter in parameters.items()}
