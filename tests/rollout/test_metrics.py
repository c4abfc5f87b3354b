"""Metrics of a rollout."""

import torch

from etpo.rollout.metrics import first_episode_reward
from etpo.rollout.types import Rollout

from ..by_token import actions_of


def test_the_first_episode_of_each_environment_counts():
    ids = torch.zeros(6, 1, dtype=torch.long)
    actions = actions_of(
        *(ids, ids == 0, ids, ids == 0),
        # three rounds of two environments; the first one ends after the first action
        rewards=torch.tensor([1.0, 0.0, 8.0, 0.5, 8.0, 0.25]),
        terminated=torch.tensor([True, False, False, False, True, False]),
        truncated=torch.tensor([False, False, False, False, False, True]),
    )
    rollout = Rollout(actions, None, [], 2, 0, 0.0, 0.0)
    assert first_episode_reward(rollout) == (1.0 + 0.75) / 2
