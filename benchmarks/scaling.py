"""Measure time and memory of ETPO iterations over action length, batch and vocabulary.

    python benchmarks/scaling.py [--sizes length batch vocabulary] [--steps 2] [--chunk TOKENS]

One size varies at a time around 64 actions of 64 tokens on a prompt of 165, with the 0.9M Llama in
float32, critic=full and one update per iteration. Every point runs in a new process: median seconds
of the iterations after the first, and peak resident memory above the memory after imports.
`exponent` is the least-squares slope of log seconds over log size; 1 is linear growth. The script
writes `scaling.csv` and `scaling.png`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from common import RESULTS, Iterations, prompt_of, save_model, write
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from etpo.runtime import keep_freed_memory

PROMPT_TOKENS = 165
DEFAULTS = {"length": 64, "batch": 64, "vocabulary": 1024}
POINTS = {
    "length": (32, 64, 128, 256, 512),
    "batch": (16, 32, 64, 128, 256),
    "vocabulary": (1024, 4096, 8192, 16384, 32768),
}
MIB = 1024  # ru_maxrss is in KiB on Linux


def run_point(sizes: dict[str, int], steps: int, chunk: int | None) -> dict[str, float]:
    """Return median seconds of an iteration and peak memory in MiB of this process."""
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prompt = prompt_of(PROMPT_TOKENS)
    with tempfile.TemporaryDirectory() as parent:
        folder = save_model(Path(parent) / "model", "0.9M", vocabulary=sizes["vocabulary"])
        overrides = [] if chunk is None else [f"algorithm.logits_chunk_size={chunk}"]
        iterations = Iterations(folder, [prompt] * sizes["batch"], sizes["length"], *overrides)
        seconds = statistics.median(iterations.run(steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": (peak - before) / MIB}


def measure(names: Sequence[str], steps: int, chunk: int | None) -> pd.DataFrame:
    """Measure every point; columns varied, size, seconds, mib."""
    rows = []
    for name in names:
        for size in POINTS[name]:
            sizes = DEFAULTS | {name: size}
            command = [sys.executable, __file__, "--point", json.dumps(sizes)]
            command += ["--steps", str(steps)]
            if chunk is not None:
                command += ["--chunk", str(chunk)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            point = json.loads(output.splitlines()[-1])
            rows.append({"varied": name, "size": size} | point)
            print(f"{name} {size}: {point['seconds']:.2f} s, {point['mib']:.0f} MiB", flush=True)
    return pd.DataFrame(rows)


def exponent(own: pd.DataFrame) -> float:
    """Return the slope of log seconds over log size."""
    return float(np.polyfit(np.log(own["size"]), np.log(own["seconds"]), 1)[0])


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the exponent of each varied size."""
    exponents = {name: exponent(own) for name, own in rows.groupby("varied")}
    return rows.assign(exponent=rows["varied"].map(exponents))


def figure(rows: pd.DataFrame) -> Figure:
    """Plot seconds and memory, one column per varied size."""
    names = list(dict.fromkeys(rows["varied"]))
    drawing = Figure(figsize=(3.2 * len(names), 5), layout="constrained")
    panels = drawing.subplots(2, len(names), squeeze=False, sharex="col")
    for column, name in enumerate(names):
        own = rows[rows["varied"] == name]
        for axes, quantity, label in zip(
            panels[:, column], ("seconds", "mib"), ("seconds per iteration", "MiB"), strict=True
        ):
            axes.loglog(own["size"], own[quantity], marker="o")
            axes.set_xticks(own["size"], [shown(size) for size in own["size"]])
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_ylabel(label if column == 0 else "")
        panels[0, column].set_title(f"exponent {exponent(own):.2f}")
        panels[1, column].set_xlabel(name)
    return drawing


def shown(size: int) -> str:
    return str(size) if size < 1024 else f"{size // 1024}k"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--chunk", type=int, help="algorithm.logits_chunk_size")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point is not None:
        print(json.dumps(run_point(given.point, given.steps, given.chunk)))
        return
    rows = measure(given.sizes, given.steps, given.chunk)
    write(given.out, "scaling", rows, table(rows), figure(rows))


if __name__ == "__main__":
    main()
