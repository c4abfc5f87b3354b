"""Rows of the finished runs of a multirun, added to those of an earlier raw.csv."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

ReadRun = Callable[[Path, dict[str, Any]], dict[str, object]]


def parsed_arguments(description: str) -> argparse.Namespace:
    """Parse the folders `out`, of raw.csv, and `multirun`, which may be missing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder of raw.csv")
    parser.add_argument("--multirun", type=Path, help="folder of the multirun")
    return parser.parse_args()


def read_raw(arguments: argparse.Namespace, read_run: ReadRun, keys: Sequence[str]) -> pd.DataFrame:
    """Return one row per finished run, sorted by `keys`; write raw.csv if the multirun is read.

    Rows of raw.csv whose `keys` the multirun does not have are kept, so that a study can grow on
    several machines. Runs that are not finished are reported on stderr. read_run: maps a run's
    folder and summary to its row.
    """
    raw = arguments.out / "raw.csv"
    if arguments.multirun is None:
        return pd.read_csv(raw)
    rows = []
    for file in sorted(arguments.multirun.glob("*/summary.json")):
        summary = json.loads(file.read_text())
        if summary["status"] == "finished":
            rows.append(read_run(file.parent, summary))
        else:
            print(f"left out: {file.parent} is {summary['status']}", file=sys.stderr)
    runs = pd.DataFrame(rows)
    if raw.exists():
        runs = pd.concat([pd.read_csv(raw), runs]).drop_duplicates([*keys], keep="last")
    runs = runs.sort_values([*keys], ignore_index=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs.to_csv(raw, index=False, lineterminator="\n")
    return runs
