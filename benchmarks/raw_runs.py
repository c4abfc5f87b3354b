"""Rows of the finished runs of a multirun, added to those of an earlier raw.csv."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from etpo.config import short_hash, tiny_checkpoint

ReadRun = Callable[[DictConfig, Path, dict[str, Any]], dict[str, object]]
# What decides the numbers of a run, in its config.
DECIDING = ("algorithm", "critic", "model", "environment", "rollout", "replay", "trainer")


def parsed_arguments(description: str) -> argparse.Namespace:
    """Parse the folders `out`, of raw.csv, and `multirun`, which may be missing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder of raw.csv")
    parser.add_argument("--multirun", type=Path, help="folder of the multirun")
    return parser.parse_args()


def read_raw(arguments: argparse.Namespace, read_run: ReadRun, keys: Sequence[str]) -> pd.DataFrame:
    """Return one row per finished run, sorted by `keys`; write raw.csv if the multirun is read.

    Rows of raw.csv whose `keys` the multirun does not have are kept, so that a study can grow on
    several machines. Runs that are not finished are reported on stderr.

    Args:
        read_run: maps a run's config, folder and summary to its row.
        keys: columns that identify a run, the last one its seed.

    Raises:
        SystemExit: seeds of one setting have run with different settings.
    """
    raw = arguments.out / "raw.csv"
    if arguments.multirun is None:
        return pd.read_csv(raw)
    rows = []
    for file in sorted(arguments.multirun.glob("*/summary.json")):
        summary = json.loads(file.read_text())
        if summary["status"] == "finished":
            config = OmegaConf.load(file.parent / ".hydra" / "config.yaml")
            assert isinstance(config, DictConfig)
            row = read_run(config, file.parent, summary)
            rows.append(row | {"settings": settings_of(config)})
        else:
            print(f"left out: {file.parent} is {summary['status']}", file=sys.stderr)
    runs = pd.DataFrame(rows)
    if raw.exists():
        runs = pd.concat([pd.read_csv(raw), runs]).drop_duplicates([*keys], keep="last")
    runs = runs.sort_values([*keys], ignore_index=True)
    different = runs.groupby([*keys[:-1]])["settings"].nunique(dropna=False) > 1
    if different.any():
        names = ", ".join(str(name) for name in different.index[different])
        sys.exit(f"{raw}: seeds of one setting have different settings: {names}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs.to_csv(raw, index=False, lineterminator="\n")
    return runs


def settings_of(config: DictConfig) -> str:
    """Return a hash of the settings of a run, equal for all seeds and on all machines."""
    config = config.copy()
    config.seed, config.paths = 0, {"log_dir": "", "output_dir": ""}
    settings = {name: OmegaConf.to_container(config[name], resolve=True) for name in DECIDING}
    text = json.dumps(settings, sort_keys=True)
    return short_hash(text.replace(json.dumps(tiny_checkpoint()), json.dumps("tiny")))
