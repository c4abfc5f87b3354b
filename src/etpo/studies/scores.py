"""Compute the numbers that a report compares from the learning curve of a run.

`rewards` are the mean rewards of a run's iterations, float [T]; `env_steps` are the actions up to
the end of each iteration, int [T].
"""

import numpy as np
import pandas as pd

from etpo.studies.read import KEYS, StudyData

LAST = 5  # iterations of the final mean reward
REACHED = 0.95  # on the normalised scale
HIGH_REWARD = 0.9
PASSED, FALL, WINDOW = 0.8, 0.3, 3  # of a collapse
ROUNDING = 1e-9  # so that a fall of exactly FALL counts


def normalised(reward: np.ndarray, first: float, best_known: float) -> np.ndarray:
    """Return (reward - first) / (best_known - first); nan unless best_known > first."""
    scale = best_known - first
    return (reward - first) / (scale if scale > 0 else np.nan)


def final_mean(rewards: np.ndarray) -> float:
    """Return the mean over the last five iterations, or over all of a shorter run."""
    return float(np.mean(rewards[-LAST:]))


def curve_area(scores: np.ndarray, env_steps: np.ndarray, budget: int) -> float:
    """Return the mean normalised reward of the iterations that end within `budget` actions."""
    return float(np.mean(scores[env_steps <= budget]))


def steps_to(values: np.ndarray, env_steps: np.ndarray, threshold: float) -> tuple[float, bool]:
    """Return the actions up to the first value >= threshold, or all, and whether there is one."""
    reached = env_steps[values >= threshold]
    return float([*reached, env_steps[-1]][0]), len(reached) > 0


def collapsed(scores: np.ndarray) -> bool:
    """Return True if the moving mean over 3 iterations fell by 0.3 below a maximum above 0.8."""
    moving = pd.Series(scores).rolling(WINDOW).mean()
    highest = moving.cummax()
    return bool(((highest > PASSED) & (highest - moving >= FALL - ROUNDING)).any())


def scales(data: StudyData, best_known: dict[str, float]) -> pd.DataFrame:
    """Return the normalised scale of every data set and its budget, the actions of a shortest run.

    The scale is the mean reward of the first iteration of all runs, and the value given in
    `best_known` or the highest reward of an action in any run.
    """
    first = data.runs[data.runs["iteration"] == 0].groupby("dataset")["rollout/reward"].mean()
    summary = data.summary.groupby("dataset")
    best, budget = summary["best_reward"].max(), summary["env_steps"].min()
    best.update(best_known)
    return pd.DataFrame({"first": first, "best_known": best, "budget": budget})


def score_runs(data: StudyData, scale: pd.DataFrame) -> pd.DataFrame:
    """Compute the scores of every run, one row each, on the `scales` of the data sets."""
    curves = data.runs.sort_values("iteration").groupby(KEYS)
    rows = [
        run_scores(curves.get_group(tuple(summary[KEYS])), summary, scale.loc[summary["dataset"]])
        for _, summary in data.summary.iterrows()
    ]
    return data.summary[KEYS].join(pd.DataFrame(rows, index=data.summary.index))


def run_scores(curve: pd.DataFrame, summary: pd.Series, scale: pd.Series) -> dict[str, object]:
    """Compute the scores of one run from its rows of `runs.csv` and `summary.csv`."""
    rewards, env_steps = curve["rollout/reward"].to_numpy(), curve["env_steps"].to_numpy()
    first, best_known, budget = scale
    scores = normalised(rewards, first, best_known)
    final, greedy = final_mean(rewards), curve["val/reward"].iloc[-1]
    steps_95, reached_95 = steps_to(scores, env_steps, REACHED)
    steps_90, reached_90 = steps_to(rewards, env_steps, HIGH_REWARD)
    if not first < HIGH_REWARD < best_known:  # all runs or none would reach it
        steps_90, reached_90 = np.nan, False
    return {
        "final": final,
        "greedy": greedy,
        "best": float(summary["best_reward"]),
        "held_out_auc": float(summary["held_out_auc"]),
        "area": curve_area(scores, env_steps, budget),
        "steps_95": np.nan if np.isnan(scores).all() else steps_95,
        "reached_95": reached_95,
        "steps_90": steps_90,
        "reached_90": reached_90,
        "collapses": collapsed(scores),
        "seconds": float(summary["wall_seconds"]),
        "final_normalised": float(normalised(final, first, best_known)),
        "greedy_normalised": float(normalised(greedy, first, best_known)),
    }
