"""Compare an iteration on two processes with one on one process, one thread each, in one run.

    python benchmarks/ranks.py [--rounds 2] [--iterations 4] [--out benchmarks/results]

With `trainer=ddp_cpu trainer.devices=2` each process samples half of an iteration's actions, in its
own environments. Embedded model, default task, no score cache. The variants alternate in each
round; the first iteration of each run is dropped. The rollout is sampling and scoring, averaged
over processes. The script writes `ranks.csv`; the table has medians.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from common import RESULTS, write

VARIANTS = {
    "one process": ("rollout.num_envs=8", "rollout.minibatch_size=32"),
    "two processes": (
        *("trainer=ddp_cpu", "trainer.devices=2"),
        *("rollout.num_envs=4", "rollout.minibatch_size=16"),
    ),
}
SIZES = (
    *("rollout.actions_per_iteration=64", "rollout.update_epochs=2", "rollout.max_new_tokens=64"),
    *("environment.sandbox.workers=1", "~callbacks.credit", "trainer.check_val_every_n_epoch=1000"),
)
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


def run(variant: str, iterations: int, seed: int, folder: Path) -> pd.DataFrame:
    """Measure all iterations after the first; columns rollout_seconds, iteration_seconds."""
    overrides = (*SIZES, *VARIANTS[variant], f"trainer.max_epochs={iterations}", f"seed={seed}")
    command = [sys.executable, "-m", "etpo.train", *overrides, f"hydra.run.dir={folder}"]
    subprocess.run(command, env=os.environ | ONE_THREAD, check=True, stdout=subprocess.DEVNULL)
    logged = pd.read_csv(folder / "metrics.csv").iloc[1:]
    rollout = logged["time/generate_seconds"] + logged["time/score_seconds"]
    return pd.DataFrame(
        {"rollout_seconds": rollout, "iteration_seconds": logged["time/iteration_seconds"]}
    ).round(3)


def measure(rounds: int, iterations: int) -> pd.DataFrame:
    """Measure all runs; columns variant, round, rollout_seconds, iteration_seconds."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in VARIANTS:
                seconds = run(name, iterations, number, Path(folder) / f"{name[:3]}{number}")
                seconds.insert(0, "round", number)
                seconds.insert(0, "variant", name)
                parts.append(seconds)
                print(f"round {number + 1}, {name}:\n{seconds.to_string(index=False)}", flush=True)
    return pd.concat(parts)


def table(measured: pd.DataFrame) -> pd.DataFrame:
    """Return median seconds of both and their ratio."""
    medians = measured.groupby("variant")[["rollout_seconds", "iteration_seconds"]].median().T
    medians["ratio"] = medians["one process"] / medians["two processes"]
    return medians.rename_axis(index="of", columns=None).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    measured = measure(given.rounds, given.iterations)
    write(given.out, "ranks", measured, table(measured))


if __name__ == "__main__":
    main()
