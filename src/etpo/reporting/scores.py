"""Learning curve of a run -> the numbers that a report compares; one function per formula.

`rewards` are the mean rewards of a run's iterations, float [T], `env_steps` the actions up to
the end of each.
"""

import numpy as np
import pandas as pd

from etpo.reporting.read import RUN, Raw

LAST = 5  # iterations of the final mean reward
REACHED = 0.95  # of the normalised scale
HIGH_REWARD = 0.9
PASSED, FALL, WINDOW = 0.8, 0.3, 3  # of a collapse
ROUNDING = 1e-9  # so that a fall of exactly FALL counts


def normalised(reward: np.ndarray, first: float, best_known: float) -> np.ndarray:
    """(reward - first) / (best_known - first); nan where nothing was better than `first`."""
    scale = best_known - first
    return (reward - first) / (scale if scale > 0 else np.nan)


def final_mean(rewards: np.ndarray) -> float:
    """Mean over the last five iterations, or over all of a shorter run."""
    return float(np.mean(rewards[-LAST:]))


def curve_area(scores: np.ndarray, env_steps: np.ndarray, budget: int) -> float:
    """Mean of the normalised rewards over the iterations that end within `budget` actions."""
    return float(np.mean(scores[env_steps <= budget]))


def steps_to(values: np.ndarray, env_steps: np.ndarray, threshold: float) -> tuple[float, bool]:
    """Actions up to the end of the first iteration with a value of `threshold` or more.

    (all actions of the run, False) where it has none: a lower bound.
    """
    reached = values >= threshold
    if not reached.any():
        return float(env_steps[-1]), False
    return float(env_steps[reached.argmax()]), True


def collapsed(scores: np.ndarray) -> bool:
    """Whether the normalised curve fell by 0.3 or more after it had passed 0.8.

    Both are of its moving mean over three iterations; the fall is from the highest so far.
    """
    if len(scores) < WINDOW:
        return False
    moving = np.convolve(scores, np.full(WINDOW, 1 / WINDOW), "valid")
    highest = np.maximum.accumulate(moving)
    return bool(((highest > PASSED) & (highest - moving >= FALL - ROUNDING)).any())


def scales(raw: Raw, best_known: dict[str, float]) -> pd.DataFrame:
    """`first`, `best_known` and `budget` of every data set, in its order.

    first: mean over all its runs of the first iteration's mean reward. best_known: the highest
    reward of a single action in any of them, unless given. budget: actions of its shortest run.
    """
    start = raw.runs[raw.runs["iteration"] == 0]
    table = pd.DataFrame(
        {
            "first": start.groupby("dataset")["rollout/reward"].mean(),
            "best_known": raw.summary.groupby("dataset")["best_reward"].max(),
            "budget": raw.summary.groupby("dataset")["env_steps"].min(),
        }
    )
    for dataset, value in best_known.items():
        table.loc[dataset, "best_known"] = value
    return table


def score_runs(raw: Raw, scale: pd.DataFrame) -> pd.DataFrame:
    """One row per run: the columns of `run_scores` beside dataset, method and seed."""
    curves = dict(list(raw.runs.groupby(RUN)))
    rows = []
    for _, summary in raw.summary.iterrows():
        run = tuple(summary[RUN])
        rows.append(
            dict(zip(RUN, run, strict=True))
            | run_scores(curves[run].sort_values("iteration"), summary, scale.loc[run[0]])
        )
    return pd.DataFrame(rows)


def run_scores(curve: pd.DataFrame, summary: pd.Series, scale: pd.Series) -> dict[str, object]:
    """The scores of one run, from its rows of runs.csv and summary.csv and its data set's scale."""
    rewards, env_steps = curve["rollout/reward"].to_numpy(), curve["env_steps"].to_numpy()
    first, best_known = scale["first"], scale["best_known"]
    scores = normalised(rewards, first, best_known)
    final, greedy = final_mean(rewards), curve["val/reward"].iloc[-1]
    steps_95, reached_95 = steps_to(scores, env_steps, REACHED)
    steps_90, reached_90 = steps_to(rewards, env_steps, HIGH_REWARD)
    if not first < HIGH_REWARD < best_known:  # all or none would reach it
        steps_90, reached_90 = np.nan, False
    if np.isnan(scores).all():
        steps_95 = np.nan
    return {
        "final": final,
        "greedy": greedy,
        "best": summary["best_reward"],
        "held_out_auc": summary["held_out_auc"],
        "area": curve_area(scores, env_steps, scale["budget"]),
        "steps_95": steps_95,
        "reached_95": reached_95,
        "steps_90": steps_90,
        "reached_90": reached_90,
        "collapses": collapsed(scores),
        "seconds": summary["wall_seconds"],
        "final_normalised": float(normalised(final, first, best_known)),
        "greedy_normalised": float(normalised(greedy, first, best_known)),
    }
