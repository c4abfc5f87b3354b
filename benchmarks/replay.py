"""Tabulate the study of actions per iteration and replay window.

    etpo-train -m sweep=replay
    python benchmarks/replay.py docs/studies/replay --multirun logs/train/multiruns/replay

This writes raw.csv (one row per run) and prints the tables of docs/studies/replay.md. Without
`--multirun` it reads the raw.csv of an earlier call.
"""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from raw_runs import parsed_arguments, read_raw

GOAL = 0.9
SPAN = 64  # actions of a mean reward, at least one iteration
RUN = ["dataset", "method", "actions", "window"]


def read_run(config: DictConfig, folder: Path, summary: dict) -> dict[str, object]:
    """Return the row of one run: actions to GOAL, end, largest fall and seconds."""
    with (folder / "metrics.csv").open(newline="") as lines:
        rewards = np.array([float(row["rollout/reward"]) for row in csv.DictReader(lines)])
    actions = summary["env_steps"] // summary["iterations"]
    smooth = trailing_means(rewards, max(1, SPAN // actions))
    reached = first_at(trailing_means(rewards, 3), GOAL)
    return {
        "dataset": config.environment.dataset,
        "method": summary["algorithm"],
        "actions": actions,
        "window": config.replay.window,
        "seed": summary["seed"],
        "iteration_at_goal": steps_to(rewards, actions),
        "mean_at_goal": steps_to(smooth, actions),
        "last": round(float(smooth[-1]), 4),
        "fall": np.nan if reached is None else round(largest_fall(rewards, reached), 4),
        "seconds": round(summary["wall_seconds"], 1),
    }


def trailing_means(values: np.ndarray, count: int) -> np.ndarray:
    """Return the mean of the last `count` values at each place, of fewer at the start."""
    return np.array([values[max(0, i + 1 - count) : i + 1].mean() for i in range(len(values))])


def first_at(values: np.ndarray, goal: float) -> int | None:
    """Return the first place with a value of at least `goal`, or None."""
    places = np.flatnonzero(values >= goal)
    return int(places[0]) if len(places) else None


def steps_to(values: np.ndarray, actions: int) -> float:
    """Return the number of actions until the first value of GOAL; infinite if it is not reached."""
    place = first_at(values, GOAL)
    return np.inf if place is None else (place + 1) * actions


def largest_fall(rewards: np.ndarray, start: int) -> float:
    """Return how far a 3-iteration mean falls below an earlier one, from iteration `start` on."""
    means = trailing_means(rewards, 3)[start:]
    return float((np.maximum.accumulate(means) - means).max())


def table(runs: pd.DataFrame) -> list[str]:
    """Return the medians over seeds of each setting in Markdown."""
    lines = [
        "| data set | method | actions | window | first iteration at 0.9 "
        "| mean of 64 actions at 0.9 | worst seed | last 64 actions | largest fall | seconds |",
        "| --- " * 10 + "|",
    ]
    for key, own in runs.groupby(RUN):
        cells = [*map(str, key)]
        for name in ("iteration_at_goal", "mean_at_goal"):
            cells.append(number(own[name].median(), 0))
        cells += [number(own["mean_at_goal"].max(), 0), number(own["last"].median(), 3)]
        cells += [number(own["fall"].max(), 3), number(own["seconds"].median(), 0)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def number(value: float, digits: int) -> str:
    """Return a number for a table, a dash for one that does not exist."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def main() -> None:
    arguments = parsed_arguments(__doc__.splitlines()[0])
    runs = read_raw(arguments, read_run, [*RUN, "seed"])
    print("\n".join([*table(runs), ""]))
    print(f"{len(runs)} runs, {runs['seconds'].sum() / 3600:.1f} hours of one core")


if __name__ == "__main__":
    main()
