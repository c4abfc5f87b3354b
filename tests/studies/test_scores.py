"""The formulas of a report, on curves that are worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from etpo.studies import scores
from etpo.studies.read import StudyData


def test_the_normalised_scale():
    reward = np.array([-0.2, 0.3, 0.8, 1.05])
    assert scores.normalised(reward, -0.2, 0.8) == pytest.approx([0, 0.5, 1, 1.25])
    assert np.isnan(scores.normalised(reward, 0.8, 0.8)).all()
    assert np.isnan(scores.normalised(reward, 0.8, 0.7)).all()


def test_the_final_mean_is_of_five_iterations():
    assert scores.final_mean(np.array([9.0, 1, 2, 3, 4, 5])) == 3
    assert scores.final_mean(np.array([1.0, 2])) == 1.5


def test_the_curve_area_ends_at_the_budget():
    values, env_steps = np.array([0.0, 0.5, 1.0, 1.0]), np.array([10, 20, 30, 40])
    assert scores.curve_area(values, env_steps, 40) == 0.625
    assert scores.curve_area(values, env_steps, 30) == 0.5


def test_steps_to_the_first_iteration_at_the_threshold():
    values, env_steps = np.array([0.1, 0.95, 0.2, 0.99]), np.array([10, 20, 30, 40])
    assert scores.steps_to(values, env_steps, 0.95) == (20, True)
    assert scores.steps_to(values, env_steps, 0.951) == (40, True)
    assert scores.steps_to(values, env_steps, 1.0) == (40, False)


@pytest.mark.parametrize(
    ("curve", "fell"),
    [
        # moving means: 0.9, 0.8, 0.7, 0.6: 0.3 below
        ([0.9, 0.9, 0.9, 0.6, 0.6, 0.6], True),
        # 0.9, 0.9 - 0.29
        ([0.9, 0.9, 0.9, 0.61, 0.61, 0.61], False),
        # one bad iteration: 0.9, 0.63
        ([0.9, 0.9, 0.9, 0.09, 0.9, 0.9], False),
        # it never passed 0.8
        ([0.8, 0.8, 0.8, 0.0, 0.0, 0.0], False),
        # the highest comes before the last
        ([0.0, 0.9, 0.9, 0.9, 0.85, 0.2, 0.2, 0.9], True),
        # a low start is no fall
        ([0.0, 0.0, 0.0, 0.9, 0.9, 0.9], False),
        ([0.9, 0.0], False),
    ],
)
def test_a_collapse_is_a_fall_of_the_moving_mean(curve, fell):
    assert scores.collapsed(np.array(curve)) is fell


def study_data(curves: dict[tuple, list[float]], best: float) -> StudyData:
    """Runs of 10 actions an iteration; best: highest reward of an action in each."""
    rows, summaries = [], []
    for run, rewards in curves.items():
        names = dict(zip(("dataset", "method", "seed"), run, strict=True))
        for iteration, reward in enumerate(rewards):
            metrics = {"rollout/reward": reward, "val/reward": reward + 0.1}
            rows.append(
                names | metrics | {"iteration": iteration, "env_steps": 10 * (iteration + 1)}
            )
        numbers = {"env_steps": 10 * len(rewards), "best_reward": best, "held_out_auc": 0.9}
        summaries.append(names | numbers | {"wall_seconds": 3.0})
    return StudyData(pd.DataFrame(rows), pd.DataFrame(summaries), pd.DataFrame())


def test_the_scale_of_a_data_set_is_shared_by_its_methods():
    runs = study_data({("d", "a", 0): [0.1, 0.5], ("d", "b", 0): [0.3, 0.6, 0.7]}, best=0.8)
    runs.summary.loc[1, "best_reward"] = 0.9
    scale = scores.scales(runs, {})
    assert scale.loc["d"].to_dict() == pytest.approx(
        {"first": 0.2, "best_known": 0.9, "budget": 20}
    )
    assert scores.scales(runs, {"d": 1.0}).loc["d", "best_known"] == 1.0


def test_the_scores_of_a_run():
    runs = study_data({("d", "a", 0): [0.0, 0.5, 0.9, 0.96], ("d", "a", 1): [0.0, 0.2]}, best=1.0)
    first, second = (row for _, row in scores.score_runs(runs, scores.scales(runs, {})).iterrows())
    assert first["final"] == pytest.approx(0.59)
    assert first["greedy"] == pytest.approx(1.06)
    assert first["area"] == pytest.approx(0.25)  # of the two iterations that both runs have
    assert (first["steps_95"], first["reached_95"]) == (40, True)
    assert (first["steps_90"], first["reached_90"]) == (30, True)
    assert (second["steps_95"], second["reached_95"]) == (20, False)
    assert (first["best"], first["held_out_auc"], first["seconds"]) == (1.0, 0.9, 3.0)


def test_no_actions_to_a_reward_that_no_action_has():
    runs = study_data({("d", "a", 0): [0.0, 0.5]}, best=0.85)
    (row,) = (row for _, row in scores.score_runs(runs, scores.scales(runs, {})).iterrows())
    assert np.isnan(row["steps_90"])
    assert not row["reached_90"]
