"""Compare how OpenMP threads wait for each other: iteration time on a quiet and a busy machine.

    python benchmarks/threads.py [--rounds 2] [--iterations 3] [--out benchmarks/results]

The variants are settings of libgomp, the OpenMP runtime of PyTorch, in the environment of
`etpo-train`. The busy machine runs one endless process per core. The task is Sokoban, whose
rewards take no time, with the embedded model. The variants alternate in each round; the first
iteration of each run is dropped. Update time is iteration time minus sampling. Writes
`threads.csv`; the table has medians.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from common import RESULTS, write

SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
VARIANTS = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "etpo's default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SIZES = (
    *("environment=sokoban", "rollout.update_epochs=3"),
    *("~callbacks.credit", "trainer.check_val_every_n_epoch=1000"),
)
COLUMNS = ["generate", "update", "iteration"]


@contextlib.contextmanager
def competing(processes: int) -> Iterator[None]:
    """Run endless processes in the background."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(variant: str, iterations: int, seed: int, folder: Path) -> pd.DataFrame:
    """Return the seconds of every iteration except the first: `COLUMNS`."""
    command = [sys.executable, "-m", "etpo.train", *SIZES, f"trainer.max_epochs={iterations}"]
    command += [f"seed={seed}", f"hydra.run.dir={folder}"]
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    subprocess.run(command, env=env | VARIANTS[variant], check=True, stdout=subprocess.DEVNULL)
    logged = pd.read_csv(folder / "metrics.csv").iloc[1:]
    iteration, generate = logged["time/iteration_seconds"], logged["time/generate_seconds"]
    return pd.concat([generate, iteration - generate, iteration], axis=1, keys=COLUMNS).round(3)


def measure(rounds: int, iterations: int, loads: list[int]) -> pd.DataFrame:
    """Return seconds of all runs: columns variant, busy (other processes), round, `COLUMNS`."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for busy in loads:
                for name in VARIANTS:
                    with competing(busy):
                        place = Path(folder) / f"{number}-{busy}-{list(VARIANTS).index(name)}"
                        seconds = run(name, iterations, number, place)
                    for column, value in (("round", number), ("busy", busy), ("variant", name)):
                        seconds.insert(0, column, value)
                    parts.append(seconds)
                    print(seconds.to_string(index=False, header=False), flush=True)
    return pd.concat(parts)


def table(measured: pd.DataFrame) -> pd.DataFrame:
    """Return median seconds, and iteration time relative to the first variant."""
    medians = measured.groupby(["busy", "variant"], sort=False)[COLUMNS].median()
    first = medians["iteration"].groupby(level="busy").transform("first")
    return medians.assign(ratio=medians["iteration"] / first).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, os.cpu_count() or 1])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    measured = measure(given.rounds, given.iterations, given.busy)
    write(given.out, "threads", measured, table(measured))


if __name__ == "__main__":
    main()
