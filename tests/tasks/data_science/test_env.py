import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv
from hydra.utils import instantiate
from omegaconf import OmegaConf

from etpo.errors import ConfigError
from etpo_sandbox import Sandbox, SandboxError
from etpo_tasks.data_science.env import DataScienceEnv
from etpo_tasks.data_science.prompts import HEADER, SUFFIX, program_from_action
from etpo_tasks.data_science.scoring import make_sandbox

pytestmark = pytest.mark.filterwarnings("ignore:lbfgs failed to converge")

REPOSITORY = Path(__file__).parents[3]

GOOD = """    from sklearn.naive_bayes import GaussianNB
    return GaussianNB().fit(x_train, y_train)
"""
BETTER = """    from sklearn.linear_model import LogisticRegression
    return LogisticRegression(max_iter=1000).fit(x_train, y_train)
"""
BAD = "    return undefined_name\n"


def make(sandbox, **arguments):
    defaults = {"dataset": "breast_cancer", "num_envs": 2, "max_attempts": 3, "n_splits": 2}
    return DataScienceEnv(sandbox=sandbox, **(defaults | arguments))


def test_construction_starts_nothing_and_reset_starts_the_sandbox(sandbox):
    env = make(sandbox)
    assert not sandbox.started
    observations, infos = env.reset(seed=0)
    assert sandbox.started
    assert infos == {}
    assert len(observations) == 2
    env.close()
    assert sandbox.closed


def test_it_is_a_gymnasium_vector_env(sandbox):
    env = make(sandbox)
    assert isinstance(env, VectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    assert env.single_observation_space.contains(observations[0])
    assert env.action_space.contains((GOOD, BAD))
    assert env.single_action_space.contains(GOOD)


def test_first_prompt_names_the_task(sandbox):
    env = make(sandbox)
    observations, _ = env.reset()
    # 569 rows: 341 stay for rewards, half of them (170) are trained on
    facts = "breast_cancer: 170 training rows, 30 features, 2 classes"
    for observation in observations:
        assert facts in observation["instruction"]
        assert observation["prefix"] == f"# {facts}\n{HEADER}"
        assert observation["suffix"] == SUFFIX


def test_repair_success_ends_and_failure_goes_on(sandbox):
    env = make(sandbox)
    first, _ = env.reset()
    observations, rewards, terminations, truncations, infos = env.step([GOOD, BAD])
    assert 0.9 < rewards[0] <= 1.0
    assert rewards[1] == -1.0
    assert rewards.dtype == np.float64
    assert terminations.tolist() == [True, False]
    assert truncations.tolist() == [False, False]
    assert infos["attempt"].tolist() == [1, 1]
    assert infos["error"].tolist() == [None, "NameError: name 'undefined_name' is not defined"]
    assert observations[0] == first[0]  # the next episode's first prompt
    assert f"scores {rewards[0]:.3f}" in infos["final_obs"][0]["prefix"]
    assert infos["final_obs"][1] is None
    assert "NameError" in observations[1]["prefix"]
    assert BAD in observations[1]["prefix"]

    _, _, terminations, _, infos = env.step([BAD, BETTER])
    assert terminations.tolist() == [False, True]
    assert infos["attempt"].tolist() == [1, 2]
    assert infos["cached"].tolist() == [True, False]


def test_repair_ends_at_the_attempt_limit(sandbox):
    env = make(sandbox)
    first, _ = env.reset()
    for attempt in (1, 2, 3):
        observations, _, terminations, truncations, infos = env.step([BAD, BAD])
        assert infos["attempt"].tolist() == [attempt] * 2
        assert terminations.tolist() == [attempt == 3] * 2
        assert not truncations.any()
    assert observations[0] == first[0]
    assert "NameError" in infos["final_obs"][0]["prefix"]
    _, _, _, _, infos = env.step([BAD, BAD])
    assert infos["attempt"].tolist() == [1, 1]


def test_improve_always_lasts_max_attempts(sandbox):
    env = make(sandbox, mode="improve")
    env.reset()
    observations, first, terminations, _, _ = env.step([GOOD, BAD])
    assert not terminations.any()
    assert "Improve it." in observations[0]["instruction"]
    assert f"{first[0]:.3f}" in observations[0]["prefix"]
    assert "Repair it." in observations[1]["instruction"]
    _, second, terminations, _, _ = env.step([BETTER, GOOD])
    assert not terminations.any()
    assert second[0] != first[0]
    assert second[1] == first[0]  # each attempt is paid its own score
    _, third, terminations, truncations, infos = env.step([BAD, GOOD])
    assert third.tolist() == [-1.0, first[0]]
    assert terminations.all()
    assert not truncations.any()
    assert infos["attempt"].tolist() == [3, 3]


def test_reset_abandons_open_episodes(sandbox):
    env = make(sandbox)
    env.reset()
    env.step([BAD, BAD])
    env.reset()
    assert env.step([BAD, BAD])[4]["attempt"].tolist() == [1, 1]


def test_progress_is_reported(sandbox):
    env = make(sandbox)
    calls = []
    env.on_score = lambda done, total: calls.append((done, total))
    env.reset()
    env.step([GOOD, BAD])
    assert calls == [(1, 2), (2, 2)]


def test_held_out(sandbox):
    program = program_from_action(GOOD)
    (score,) = make(sandbox).held_out([program])
    assert 0.9 < score.reward <= 1.0
    assert make(sandbox, protocol="paper").held_out([program]) is None


def test_remember_carries_the_best_and_the_last_errors_into_later_prompts(sandbox):
    env = make(sandbox, mode="remember", max_attempts=2)
    (first, _), _ = env.reset()
    facts, _, header = first["prefix"].partition("def")
    observations, rewards, terminations, _, infos = env.step([GOOD, BAD])
    assert terminations.tolist() == [True, False]
    name_error, score = infos["error"][1], f"{rewards[0]:.3f}"
    best = f"# scores {score}:\n{HEADER}{GOOD}"
    end = f"def{header}"
    # what the episode itself did comes once, without the memory of this step
    assert observations[1]["prefix"] == (
        f"{facts}# failed:\n{HEADER}{BAD}# {name_error}\n# repaired:\n{end}"
    )
    assert observations[0]["prefix"] == (
        f"{facts}# earlier error: {name_error}\n{best}# improved:\n{end}"
    )
    assert f"An earlier attempt failed with {name_error}" in observations[0]["instruction"]
    assert f"This program scores {score}" in observations[0]["instruction"]
    assert "Improve it." in observations[0]["instruction"]
    # a worse program and the same error again change nothing; the memory precedes the failure
    observations, _, _, _, infos = env.step(["    return 1 / 0\n", BAD])
    zero_error = infos["error"][0]
    assert observations[0]["prefix"] == (
        f"{facts}# earlier error: {name_error}\n{best}# failed:\n{HEADER}    return 1 / 0\n"
        f"# {zero_error}\n# repaired:\n{end}"
    )
    assert observations[1]["prefix"] == (
        f"{facts}# earlier error: {zero_error}\n# earlier error: {name_error}\n{best}"
        f"# improved:\n{end}"
    )


def test_remember_keeps_three_errors_and_nothing_of_an_evaluation(sandbox):
    env = make(sandbox, mode="remember", max_attempts=1)
    (start, _), _ = env.reset()
    for _ in range(2):
        env.reset(options={"evaluation": True})
        observations, *_ = env.step([GOOD, BAD])
        assert observations == (start, start)
    env.reset(options={"evaluation": False})
    for names in (("a", "b"), ("c", "a"), ("d", "d")):
        observations, *_ = env.step([f"    return {name}_\n" for name in names])
    shown = re.findall(r"# earlier error: NameError: name '(.)_'", observations[0]["prefix"])
    assert shown == ["c", "a", "d"]
    other = make(sandbox, mode="remember")
    other.load_state_dict(env.state_dict())
    assert other.reset()[0] == observations
    assert "memory" not in make(sandbox).state_dict()


def test_wrong_number_of_actions(sandbox):
    env = make(sandbox)
    env.reset()
    with pytest.raises(ValueError, match="1 actions for 2 environments"):
        env.step([GOOD])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_attempts": 0}, r"environment\.max_attempts=0.*1 or more"),
        ({"max_attempts": 2.5}, r"environment\.max_attempts=2\.5"),
        ({"max_attempts": True}, r"environment\.max_attempts=True"),
        ({"n_splits": 0}, r"environment\.n_splits=0"),
        ({"num_envs": 0}, r"environment\.num_envs=0"),
        ({"split_seed": -1}, r"environment\.split_seed=-1.*from 0 to 4294967295"),
        ({"split_seed": 2**32}, r"environment\.split_seed=4294967296"),
        ({"mode": "retry"}, r"environment\.mode=retry.*repair, improve, remember"),
        ({"protocol": "cv"}, r"environment\.protocol=cv.*held_out, paper"),
        ({"missing": "zero"}, r"environment\.missing=zero.*impute, drop"),
        ({"dataset": "irs"}, r"environment\.dataset=irs.*did you mean iris"),
    ],
)
def test_bad_values_name_the_key(arguments, expected, sandbox):
    with pytest.raises(ConfigError, match=expected) as caught:
        make(sandbox, **arguments)
    assert "\n" not in str(caught.value)
    assert not sandbox.started


def test_config_names_the_constructors_arguments():
    config = OmegaConf.load(REPOSITORY / "conf" / "environment" / "data_science.yaml")
    assert set(config) - {"_target_"} == set(inspect.signature(DataScienceEnv).parameters)
    assert set(config.sandbox) - {"_target_"} == set(inspect.signature(Sandbox).parameters)


def test_config_builds_the_environment():
    config = OmegaConf.load(REPOSITORY / "conf" / "environment" / "data_science.yaml")
    config = OmegaConf.create({"rollout": {"num_envs": 3}, "environment": config})
    env = instantiate(config.environment)
    assert env.num_envs == 3
    assert env.scorer.split_seed == 0
    assert len(env.scorer.held_out_rows) == 384  # 40% of 958, rounded up
    assert isinstance(env.sandbox, Sandbox)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [("level", "none", "full, bubblewrap, unsafe"), ("workers", 0, "1 or more")],
)
def test_bad_sandbox_settings_name_the_key(key, value, allowed):
    with pytest.raises(ConfigError, match=rf"^environment\.sandbox\.{key}={value} .*{allowed}"):
        make_sandbox(**{key: value})


def test_a_sandbox_that_does_not_hold_is_bad_input(sandbox):
    def start():
        raise SandboxError("level=full does not hold on this machine")

    sandbox.start = start
    with pytest.raises(ConfigError, match=r"^environment\.sandbox\.level=full does not hold"):
        make(sandbox).reset()
