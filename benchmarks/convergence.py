"""Plot and tabulate the distance of token-MDP runs to their exact optimum.

    etpo-train -m experiment=token_mdp seed=0,1,2 study=convergence
    python benchmarks/convergence.py logs/train/multiruns/convergence docs/studies

This writes docs/studies/convergence.csv (one row per seed and measured iteration) and
convergence.png, and prints the table of docs/studies/convergence.md.
"""

import argparse
import csv
import json
from pathlib import Path

from matplotlib.figure import Figure

METRICS = ("oracle/kl", "oracle/kl_max", "oracle/value_error", "oracle/value")
BOUND = 0.02
# Okabe-Ito palette; dashes for readers without colour
STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))

Points = list[tuple[int, dict[str, float]]]  # environment steps, METRICS


def read_runs(folder: Path) -> dict[int, tuple[list[dict[str, str]], dict]]:
    """Return seed -> (rows of metrics.csv, summary.json) of the finished runs under `folder`."""
    runs = {}
    for file in folder.glob("*/summary.json"):
        summary = json.loads(file.read_text())
        if summary["status"] != "finished":
            continue
        with file.with_name("metrics.csv").open(newline="") as lines:
            runs[summary["seed"]] = (list(csv.DictReader(lines)), summary)
    return dict(sorted(runs.items()))


def measured(rows: list[dict[str, str]], env_steps: int) -> Points:
    """Return the measured iterations of a metrics.csv; `env_steps` counts the whole run."""
    per_iteration = env_steps // len(rows)
    return [
        ((int(row["iteration"]) + 1) * per_iteration, {name: float(row[name]) for name in METRICS})
        for row in rows
        if row.get("oracle/kl")
    ]


def figure(runs: dict[int, Points]) -> Figure:
    """Plot KL to the optimum and value error against environment steps."""
    drawing = Figure(figsize=(7, 6), layout="constrained")
    panels = drawing.subplots(2, sharex=True)
    for (seed, points), (colour, dashes) in zip(runs.items(), STYLES, strict=False):
        steps = [count for count, _ in points]
        for axes, name in zip(panels, ("oracle/kl", "oracle/value_error"), strict=True):
            line = [numbers[name] for _, numbers in points]
            axes.plot(steps, line, color=colour, linestyle=dashes, label=f"seed {seed}")
    for axes, label in zip(
        panels,
        ("KL(pi || pi*) of whole actions, nats", "largest |V - V*|, reward"),
        strict=True,
    ):
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.axhline(BOUND, color="black", linewidth=0.8)
        axes.annotate(
            f"{BOUND}", (0.995, BOUND), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    panels[0].legend(frameon=False)
    panels[1].set_xlabel("environment steps (actions)")
    panels[1].set_xlim(left=0)
    drawing.align_ylabels()
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("multirun", type=Path, help="folder of the multirun")
    parser.add_argument("out", type=Path, help="folder for the figure and the raw numbers")
    arguments = parser.parse_args()
    finished = read_runs(arguments.multirun)
    runs = {seed: measured(rows, s["env_steps"]) for seed, (rows, s) in finished.items()}
    with (arguments.out / "convergence.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "env_steps", *METRICS])
        for seed, points in runs.items():
            for steps, numbers in points:
                writer.writerow([seed, steps, *(f"{numbers[name]:.5f}" for name in METRICS)])
    figure(runs).savefig(arguments.out / "convergence.png", dpi=150)
    print("| seed | V* of the start | KL first | KL | worst state's KL | value error | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for seed, points in runs.items():
        last = points[-1][1]
        cells = [f"{last['oracle/value']:.3f}", f"{points[0][1]['oracle/kl']:.3f}"]
        cells += [f"{last[name]:.4f}" for name in METRICS[:3]]
        print(f"| {seed} | {' | '.join(cells)} | {finished[seed][1]['wall_seconds']:.0f} |")


if __name__ == "__main__":
    main()
