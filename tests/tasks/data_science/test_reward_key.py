"""Scores of a checkpoint belong to its data, splits and limits."""

import pytest

from etpo_sandbox import Sandbox
from etpo_tasks.data_science.env import DataScienceEnv


def environment(deadline: float = 10.0, **options) -> DataScienceEnv:
    sandbox = Sandbox(level="unsafe", workers=1, deadline=deadline, memory_mib=512)
    return DataScienceEnv(**{"dataset": "iris", "n_splits": 1} | options, sandbox=sandbox)


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, True),
        ({"num_envs": 2}, True),
        ({"dataset": "wine"}, False),
        ({"split_seed": 1}, False),
        ({"n_splits": 2}, False),
        ({"protocol": "paper"}, False),
        ({"deadline": 1.0}, False),
    ],
)
def test_scores_are_taken_over_where_nothing_that_they_depend_on_has_changed(changed, kept):
    before = environment()
    before.scorer.load_scores({"program": (0.5, None)})
    after = environment(**changed)
    after.load_state_dict(before.state_dict())
    assert after.scorer.known_scores() == ({"program": (0.5, None)} if kept else {})
