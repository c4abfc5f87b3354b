"""Table and raw numbers of a multirun over seeds.

    etpo-train -m seed=0,1,2,3,4 study=default_seeds
    python benchmarks/learning_table.py logs/train/multiruns/default_seeds docs/studies

writes docs/studies/default_seeds.csv (one row per seed and iteration) and prints the table of
docs/studies/default_seeds.md.
"""

import argparse
import csv
import json
from pathlib import Path
from statistics import fmean

PASSED = 0.85  # "learned": the mean reward of an iteration first exceeds this


def read_runs(folder: Path) -> dict[int, tuple[list[dict[str, str]], dict]]:
    """Seed -> (rows of metrics.csv, summary.json) of the finished runs under `folder`."""
    runs = {}
    for file in folder.glob("*/summary.json"):
        summary = json.loads(file.read_text())
        if summary["status"] != "finished":
            continue
        with file.with_name("metrics.csv").open(newline="") as lines:
            runs[summary["seed"]] = (list(csv.DictReader(lines)), summary)
    return dict(sorted(runs.items()))


def table_row(seed: int, rows: list[dict[str, str]], summary: dict) -> list[str]:
    """The cells of one seed."""
    rewards = [float(row["rollout/reward"]) for row in rows]
    passed = next((i for i, reward in enumerate(rewards) if reward > PASSED), None)
    held_out = summary["held_out_auc"]
    return [
        str(seed),
        f"{rewards[0]:.3f}",
        f"{fmean(rewards[-5:]):.3f}",
        f"{float(rows[-1]['val/reward']):.3f}",
        "-" if passed is None else str(passed + 1),
        "-" if passed is None else f"{min(rewards[passed:]):.3f}",
        f"{summary['best_reward']:.3f}",
        "-" if held_out is None else f"{held_out:.3f}",
        f"{summary['wall_seconds']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("multirun", type=Path, help="folder of the multirun")
    parser.add_argument("out", type=Path, help="folder for the raw numbers")
    arguments = parser.parse_args()
    runs = read_runs(arguments.multirun)
    metrics = ("rollout/reward", "rollout/valid_rate", "val/reward", "rollout/kl_to_reference")
    with (arguments.out / f"{arguments.multirun.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "iteration", *metrics])
        for seed, (rows, _) in runs.items():
            for row in rows:
                values = [f"{float(row[metric]):.6f}" for metric in metrics]
                writer.writerow([seed, row["iteration"], *values])
    head = (
        "seed",
        "first mean reward",
        "mean reward, last 5",
        "greedy reward, last",
        f"first iteration above {PASSED}",
        "lowest after it",
        "best reward",
        "held-out ROC AUC of the best",
        "seconds",
    )
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for seed, (rows, summary) in runs.items():
        print("| " + " | ".join(table_row(seed, rows, summary)) + " |")


if __name__ == "__main__":
    main()
