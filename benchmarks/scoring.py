"""Compare programs per second in the sandbox and in a fresh interpreter per program.

    python benchmarks/scoring.py [--programs 6] [--rounds 3] [--out benchmarks/results]

Both score the same programs on the same five splits of tic_tac_toe, with one BLAS thread each. The
fresh interpreter imports scikit-learn, runs all splits in one process and confines nothing. The
variants alternate in each round; the table has medians over the rounds. Writes `scoring.csv`.
"""

import argparse
import os
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from etpo_sandbox import Sandbox, Split
from etpo_tasks.data_science.datasets import load_dataset
from etpo_tasks.data_science.scoring import ProgramScorer

MODELS = {
    "LogisticRegression": "linear_model.LogisticRegression(max_iter=1000)",
    "RandomForest(100)": "ensemble.RandomForestClassifier(100)",
}
PROGRAM = """from sklearn import ensemble, linear_model

def build_model(x_train, y_train):
    return {model}.fit(x_train, y_train)
"""
FRESH = """
import pickle, sys
program, splits = pickle.load(sys.stdin.buffer)
names = {}
exec(program, names)
for x_train, y_train, x_test in splits:
    names["build_model"](x_train, y_train).predict_proba(x_test)
"""
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


def in_fresh_interpreters(programs: list[str], splits: list[Split]) -> None:
    """Run one process per program, sequentially."""
    plain = [(s.x_train, s.y_train, s.x_test) for s in splits]
    for program in programs:
        subprocess.run(
            [sys.executable, "-c", FRESH],
            input=pickle.dumps((program, plain)),
            env=os.environ | ONE_THREAD,
            check=True,
        )


def in_sandbox(sandbox: Sandbox, programs: list[str], splits: list[Split]) -> None:
    """Run all programs at once; raise RuntimeError if one fails."""
    outcomes = sandbox.run(programs, splits, 2, seed=0)
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failed:
        raise RuntimeError(failed[0])


def measure(count: int, rounds: int) -> pd.DataFrame:
    """Measure every round: columns model, variant, round, programs_per_second."""
    rows = []
    with Sandbox(workers=1) as one, Sandbox(workers=2) as two:
        splits = [split for split, _ in ProgramScorer(load_dataset("tic_tac_toe"), one).folds]
        variants: dict[str, Callable[[list[str]], None]] = {
            "fresh interpreter": lambda programs: in_fresh_interpreters(programs, splits),
            "sandbox, 1 worker": lambda programs: in_sandbox(one, programs, splits),
            "sandbox, 2 workers": lambda programs: in_sandbox(two, programs, splits),
        }
        for model, text in MODELS.items():
            programs = [PROGRAM.format(model=text)] * count
            for number in range(rounds):
                for name, run in variants.items():
                    start = time.perf_counter()
                    run(programs)
                    rate = count / (time.perf_counter() - start)
                    rows.append((model, name, number, round(rate, 3)))
                    print(f"{model}, round {number + 1}, {name}: {rate:.2f} per second", flush=True)
    return pd.DataFrame(rows, columns=["model", "variant", "round", "programs_per_second"])


def table(measured: pd.DataFrame) -> str:
    """Return medians and their ratios as Markdown."""
    rates = measured.groupby(["model", "variant"])["programs_per_second"].agg(statistics.median)
    lines = [
        "| programs | fresh interpreter | sandbox, 1 worker | sandbox, 2 workers | "
        "1 worker / fresh | 2 workers / 1 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model in MODELS:
        fresh, one, two = (
            rates[model, name]
            for name in ("fresh interpreter", "sandbox, 1 worker", "sandbox, 2 workers")
        )
        lines.append(
            f"| {model} | {fresh:.2f}/s | {one:.2f}/s | {two:.2f}/s | "
            f"{one / fresh:.1f} | {two / one:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    measured = measure(given.programs, given.rounds)
    given.out.mkdir(parents=True, exist_ok=True)
    measured.to_csv(given.out / "scoring.csv", index=False)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(table(measured))


if __name__ == "__main__":
    main()
