import itertools
from threading import Event

import numpy as np
import pytest
import torch

from etpo.errors import ConfigError
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.models.token_columns import unpack
from etpo.rollout import collector
from etpo.rollout.collector import collect
from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.trajectories import from_trajectories, to_trajectories, trajectory_layout
from etpo.rollout.types import pad_stack


def rollout(folder, env, rounds=4, **settings):
    policy = LanguageModelPolicy(str(folder), CompletionTemplate())
    generator = torch.Generator().manual_seed(0)
    return collect(policy, env, rounds, 6, generator, seed=0, **settings), policy


def test_episodes_end_restart_and_are_cut_at_the_last_round(checkpoint, letter_env):
    played, policy = rollout(checkpoint("llama"), letter_env(2, length=3))
    actions = played.actions
    # rows are ordered by round, then environment; episodes of three actions, then a new one
    assert actions.step.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert actions.terminated.tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert actions.truncated.tolist() == [False] * 6 + [True] * 2
    assert [r.attempt for r in played.records] == [1, 1, 2, 2, 3, 3, 1, 1]
    # the bootstrap prompts are the true next observations of the two open episodes
    following = [f"go{r.action[:2]}" for r in played.records[-2:]]
    expected = policy.encode([{"instruction": "", "prefix": p, "suffix": ""} for p in following])
    assert torch.equal(played.bootstrap.prompt_ids, expected.ids)
    assert torch.equal(played.bootstrap.prompt_mask, expected.mask)
    assert played.bootstrap.step_mask.tolist() == [[True], [True]]


def test_a_termination_in_the_last_round_needs_no_bootstrap(checkpoint, letter_env):
    played, _ = rollout(checkpoint("llama"), letter_env(2, length=2))
    assert not played.actions.truncated.any()
    assert played.bootstrap is None


def test_rows_hold_the_sampled_actions(checkpoint, letter_env):
    played, policy = rollout(checkpoint("llama"), letter_env(3))
    actions = played.actions
    for row, record in enumerate(played.records):
        prompt = actions.prompt_ids[row][actions.prompt_mask[row]]
        assert policy.tokenizer.decode(prompt) == record.prompt
        assert policy.decode(actions.action_ids[row][actions.action_mask[row]].tolist()) == (
            record.action
        )
        assert record.reward == record.action.count("c") / max(len(record.action), 4)
    metrics = rollout_metrics(played)
    assert metrics["rollout/reward"] == sum(r.reward for r in played.records) / 12
    assert metrics["rollout/action_tokens"] == actions.action_mask.sum() / 12


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_change_the_order_of_drawing_and_nothing_else(checkpoint, letter_env, groups):
    played, policy = rollout(checkpoint("llama"), letter_env(3), pipeline_groups=groups)
    actions = played.actions
    assert actions.step.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3
    assert [r.env for r in played.records] == [0, 1, 2] * 4
    assert actions.truncated.tolist() == [False] * 9 + [True] * 3
    for row, record in enumerate(played.records):
        ids = actions.action_ids[row][actions.action_mask[row]]
        assert policy.decode(ids.tolist()) == record.action
        assert record.reward == record.action.count("c") / max(len(record.action), 4)
        if row >= 3:  # the prompt carries the same environment's last action
            before = "" if record.attempt == 1 else played.records[row - 3].action[:2]
            assert record.prompt == f"go{before}"
    greedy = [
        collect(policy, letter_env(3), 4, 6, None, seed=0, pipeline_groups=g).records
        for g in (1, groups)
    ]
    assert greedy[0] == greedy[1]


def test_a_group_is_scored_while_the_next_one_is_generated(checkpoint, letter_env, monkeypatch):
    generated = [Event() for _ in range(4)]  # two groups, two rounds
    started, answered = itertools.count(), itertools.count()
    generate = collector.generate

    def watch(*arguments):
        generated[next(started)].set()
        return generate(*arguments)

    class Patient(letter_env):
        def step_part(self, actions, envs):
            following = min(next(answered) + 1, 3)
            assert generated[following].wait(timeout=30)
            return super().step_part(actions, envs)

    monkeypatch.setattr(collector, "generate", watch)
    played, _ = rollout(checkpoint("llama"), Patient(4), rounds=2, pipeline_groups=2)
    assert len(played.records) == 8


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({1: [0.0, float("nan")]}, "reward=nan: allowed is a finite number"),
        ({1: torch.tensor([1e39, 0.0], dtype=torch.float64)}, "reward="),
        ({1: [0.0]}, "1 rewards: allowed are 2"),
        ({2: ["no", False]}, "terminated='no'"),
        ({0: [{"prefix": "go"}] * 2}, "observation="),
        ({4: {}}, "infos lacks final_obs"),
    ],
)
def test_invalid_answers_of_an_environment_are_config_errors(
    checkpoint, letter_env, changes, allowed
):
    class Careless(letter_env):
        def step_part(self, actions, envs):
            answer = super().step_part(actions, envs)
            return [changes.get(place, value) for place, value in enumerate(answer)]

    for groups in (1, 2):
        with pytest.raises(ConfigError, match=f"^environment letters: {allowed}"):
            rollout(checkpoint("llama"), Careless(2 * groups), rounds=1, pipeline_groups=groups)


@pytest.mark.parametrize("groups", [1, 2])
def test_rounds_with_and_without_an_action_space_are_one_batch(checkpoint, letter_env, groups):
    class Mixed(letter_env):
        grammar = {"regex": "no[wt]"}

        def first(self):  # without them the grammar decides
            return super().first() | {"choices": ("ab", "cd")}

    played, policy = rollout(checkpoint("llama"), Mixed(2, 3), pipeline_groups=groups)
    actions, size = played.actions, policy.vocabulary_size
    for row, record in enumerate(played.records):
        first = record.attempt == 1
        assert record.action in (("ab", "cd") if first else ("now", "not"))
        assert not record.length_limited
        steps = [True, False, False] if first else [False, False, True, False]
        assert actions.step_mask[row][actions.action_mask[row]].tolist() == steps
        inside = unpack(actions.allowed[row], None, size).sum(1)
        assert inside.tolist() == [2 if step else 0 for step in actions.step_mask[row].tolist()]
    # of the open episodes, after the tokens that the grammar forces
    letters = played.bootstrap.action_ids[:, :2].tolist()
    assert [policy.decode(ids) for ids in letters] == ["no", "no"]
    assert played.bootstrap.step_mask.tolist() == [[False, False, True]] * 2


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_without_choices_keep_the_whole_vocabulary(checkpoint, letter_env, groups):
    class Mixed(letter_env):
        def first(self):
            return super().first() | {"choices": ("ab", "cd")}

    played, policy = rollout(checkpoint("llama"), Mixed(2, 3), pipeline_groups=groups)
    inside = unpack(played.actions.allowed, None, policy.vocabulary_size).sum(-1)
    for record, row, steps in zip(played.records, inside, played.actions.step_mask, strict=True):
        expected = 2 if record.attempt == 1 else policy.vocabulary_size
        assert (row[steps] == expected).all()
    assert played.bootstrap.allowed.numel() == 0  # none of their observations has choices


def test_records_are_plain_python(checkpoint, letter_env):
    class Arrays(letter_env):
        def step_part(self, actions, envs):
            observations, rewards, *ended, infos = super().step_part(actions, envs)
            infos["error"] = np.array([ValueError("bad"), np.False_], dtype=object)
            infos["cached"] = torch.tensor([True, False])
            return observations, rewards.astype(np.float32), *ended, infos

    played, _ = rollout(checkpoint("llama"), Arrays(2), rounds=1)
    assert [record.error for record in played.records] == ["bad", None]
    assert [record.cached for record in played.records] == [True, False]
    kinds = (int, int, str, str, float, (str, type(None)), bool, bool, dict)
    for record in played.records:
        assert all(isinstance(v, k) for v, k in zip(record, kinds, strict=True))
        assert type(record.reward) is float


def test_a_failure_ends_the_rollout_while_another_group_hangs(checkpoint, letter_env):
    released = Event()

    class Hanging(letter_env):
        def step_part(self, actions, envs):
            if envs[0]:
                released.wait(60)
            raise RuntimeError("server gone")

    try:
        with pytest.raises(RuntimeError, match="server gone"):
            rollout(checkpoint("llama"), Hanging(4), pipeline_groups=2)
    finally:
        released.set()


def test_trajectories_order_the_tokens_of_an_environment_by_time():
    # 2 environments, 2 rounds; rows: (round 0, env 0), (0, 1), (1, 0), (1, 1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]).bool()
    values = torch.tensor([[1.0, 2, 9], [3, 9, 9], [4, 9, 9], [5, 6, 7]])
    layout = trajectory_layout(mask, num_envs=2)
    assert to_trajectories(values, layout).tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    back = from_trajectories(to_trajectories(values, layout), layout, like=values)
    assert torch.equal(back, values * mask)


def test_pad_stack_pads_on_the_given_side():
    rows = [torch.tensor([[1, 2]]), torch.tensor([[3]])]
    assert pad_stack(rows, 0, left=True).tolist() == [[1, 2], [0, 3]]
    assert pad_stack(rows, 0, left=False).tolist() == [[1, 2], [3, 0]]
    wide = [torch.ones(1, 2, 3), torch.ones(1, 1, 3)]
    assert pad_stack(wide, 0, left=False).sum(-1).tolist() == [[3, 3], [3, 0]]
