"""Plot and tabulate the actions to 90% of the optimum of the credit suite, by length and turns.

    etpo-train -m sweep=credit_scaling
    etpo-train -m sweep=credit_scaling replay.window=4 algorithm=etpo,ppo_kl,poad,grpo
    python benchmarks/credit_scaling.py docs/studies/credit_scaling \
        --multirun logs/train/multiruns/credit_scaling

This writes raw.csv (one row per run) and map.png, and prints the table of
docs/studies/credit_scaling.md. Without `--multirun` it reads the raw.csv of an earlier call.
"""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig
from raw_runs import parsed_arguments, read_raw

from etpo_tasks.credit_optimum import solved_iteration

ARMS = {"length": "letters per action, one turn", "turns": "turns, 4 letters per action"}
SOLVED_AT, WINDOW = 0.9, 3
RESAMPLES = 2000
# Okabe-Ito palette; dashes and markers for readers without colour
STYLES = {
    "etpo": ("#0072B2", "-", "o"),
    "ppo_kl": ("#D55E00", "--", "s"),
    "poad": ("#009E73", "-.", "^"),
    "ntpo": ("#CC79A7", ":", "v"),
    "archer": ("#56B4E9", (0, (6, 1, 1, 1, 1, 1)), "D"),
    "grpo": ("#E69F00", (0, (8, 3)), "P"),
    "rloo": ("#000000", (0, (1, 2)), "X"),
    "gigpo": ("#777777", (0, (4, 1, 1, 1)), "*"),
}


def read_run(config: DictConfig, folder: Path, summary: dict) -> dict[str, object]:
    """Return the row of one run.

    `steps` counts the actions up to the first iteration that ends WINDOW ones with a mean of
    `suite/fraction` of SOLVED_AT; of a censored run all its actions.
    """
    with (folder / "metrics.csv").open(newline="") as lines:
        fractions = [float(row["suite/fraction"]) for row in csv.DictReader(lines)]
    solved = solved_iteration(fractions, SOLVED_AT, WINDOW)
    per_iteration = summary["env_steps"] // summary["iterations"]
    return {
        "method": summary["algorithm"],
        "window": config.replay.window,
        "length": config.environment.length,
        "turns": config.environment.turns,
        "seed": summary["seed"],
        "steps": summary["env_steps"] if solved is None else (solved + 1) * per_iteration,
        "censored": int(solved is None),
        "last_fraction": round(float(np.mean(fractions[-WINDOW:])), 4),
        "seconds": round(summary["wall_seconds"], 1),
    }


def arm_of(runs: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Return the runs of an arm: one dial varies, the other has its smallest value."""
    other = next(name for name in ARMS if name != arm)
    return runs[runs[other] == runs[other].min()]


def samples(runs: pd.DataFrame, arm: str) -> dict[int, np.ndarray]:
    """Return value of the dial -> steps of each seed, infinite if censored."""
    steps = runs["steps"].where(runs["censored"] == 0, np.inf)
    return {value: steps[own.index].to_numpy() for value, own in runs.groupby(arm)}


def exponent(medians: dict[int, float]) -> float:
    """Return the slope of log steps against log dial by least squares, over finite medians."""
    known = [(value, steps) for value, steps in medians.items() if np.isfinite(steps)]
    if len(known) < 2:
        return np.nan
    return float(np.polyfit(*np.log(np.array(known, dtype=float)).T, 1)[0])


def medians_of(points: dict[int, np.ndarray]) -> dict[int, float]:
    """Return the median over seeds of each point; infinite if half of the seeds are censored."""
    return {v: float(np.median(steps)) for v, steps in points.items()}


def exponent_interval(points: dict[int, np.ndarray]) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval; seeds are resampled within each point."""
    random = np.random.default_rng(0)
    if any(len(steps) < 2 for steps in points.values()):
        return np.nan, np.nan
    slopes = [
        exponent(medians_of({v: random.choice(s, len(s)) for v, s in points.items()}))
        for _ in range(RESAMPLES)
    ]
    known = [slope for slope in slopes if np.isfinite(slope)]
    return tuple(np.percentile(known, [2.5, 97.5])) if known else (np.nan, np.nan)


def draw(axes: Axes, runs: pd.DataFrame, arm: str, method: str, shift: float) -> None:
    """Draw the medians of a method as a line, its seeds as points; censored ones are hollow."""
    colour, dashes, marker = STYLES[method]
    points = samples(runs, arm)
    medians = {v: m for v, m in medians_of(points).items() if np.isfinite(m)}
    axes.plot(
        [*medians], [*medians.values()], color=colour, linestyle=dashes, marker=marker, label=method
    )
    for censored, face in ((0, colour), (1, "none")):
        own = runs[runs["censored"] == censored]
        style = {"edgecolors": colour, "facecolors": face, "marker": "^" if censored else "."}
        axes.scatter(own[arm] * shift, own["steps"], s=22, linewidths=0.8, **style)


def figure(runs: pd.DataFrame) -> Figure:
    """Plot steps to 90% of the optimum on logarithmic axes: rows are windows, columns arms."""
    windows = sorted(set(runs["window"]))
    drawing = Figure(figsize=(11, 4.3 * len(windows)), layout="constrained")
    panels = drawing.subplots(len(windows), 2, sharex="col", sharey="col", squeeze=False)
    places = [(window, arm) for window in windows for arm in ARMS]
    for axes, (window, arm) in zip(panels.flat, places, strict=True):
        own = arm_of(runs[runs["window"] == window], arm)
        methods = [method for method in STYLES if method in set(own["method"])]
        for place, method in enumerate(methods):
            shift = 1.03 ** (place - len(methods) / 2)  # so that points do not cover each other
            draw(axes, own[own["method"] == method], arm, method, shift)
        axes.set(xscale="log", yscale="log", xlabel=ARMS[arm], title=f"replay.window={window}")
        axes.set_ylabel("actions to 90% of the optimum")
        values = sorted(set(own[arm]))
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.5, alpha=0.4)
    handles = panels[0, 0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside right", frameon=False)
    return drawing


def table(runs: pd.DataFrame, arm: str) -> list[str]:
    """Return the rows of an arm in Markdown: medians, solved seeds if not all, exponent."""
    own = arm_of(runs, arm)
    values = sorted(set(own[arm]))
    lines = [
        f"| {arm} | {' | '.join(map(str, values))} | exponent |",
        "| --- " * (len(values) + 2) + "|",
    ]
    for method in (m for m in STYLES if m in set(own["method"])):
        points = samples(own[own["method"] == method], arm)
        medians, cells = medians_of(points), []
        for value in values:
            steps = points.get(value, np.array([]))
            solved = f" ({np.isfinite(steps).sum()}/{len(steps)})" if np.isinf(steps).any() else ""
            median = medians.get(value, np.nan)
            cells.append((f"{median:.0f}" if np.isfinite(median) else "-") + solved)
        low, high = exponent_interval(points)
        cells.append(f"{exponent(medians):.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def main() -> None:
    arguments = parsed_arguments(__doc__.splitlines()[0])
    runs = read_raw(arguments, read_run, ["window", "method", "length", "turns", "seed"])
    figure(runs).savefig(arguments.out / "map.png", dpi=150)
    for window, own in runs.groupby("window"):
        print(f"replay.window={window}\n")
        for arm in ARMS:
            print("\n".join([*table(own, arm), ""]))
    print(f"{len(runs)} runs, {runs['seconds'].sum() / 3600:.1f} hours of one core")


if __name__ == "__main__":
    main()
