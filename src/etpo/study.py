"""Studies: a multirun whose finished cells are skipped, half-done ones resumed, failed ones told.

The same command again goes on with a study. Several processes, also on several machines with a
common folder, share a study when each is given the same command: a cell belongs to the process
that holds its lock.
"""

import json
import math
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from etpo.config import IGNORED_KEYS
from etpo.errors import ConfigError, OutputError, UnknownMetric, error_line
from etpo.files import read_rows, write_text
from etpo.run_folder import claimed, is_main_process, save_config


def run_cell(cfg: DictConfig, run: Callable[[DictConfig], float | None]) -> float | None:
    """The optimised metric of a cell, which `run` trains unless that was done before.

    None where another process trains it, where it fails and where the metric is not finite; a
    failure leaves `failed.txt`, one line and the traceback. A cell that has a checkpoint goes on
    from there. An environment that changes the working directory changes it for its own cell alone.
    An unknown metric ends the process with status 2.
    """
    folder = Path(cfg.paths.output_dir)
    name = " ".join(HydraConfig.get().overrides.task)
    with claimed(folder) as mine, chdir(Path.cwd()):
        if not mine:
            print(f"\ncell {name}\n  is being run by another process", flush=True)
            return None
        (folder / "failed.txt").unlink(missing_ok=True)
        new = not (folder / "cell.json").exists()
        try:
            check_unchanged(folder, cfg)
            if shortcoming(folder) is None:
                print(f"\ncell {name}\n  was finished before: {folder}", flush=True)
                return finite(last_metric(folder, cfg.optimized_metric))
            last = folder / "checkpoints" / "last.ckpt"
            if cfg.ckpt_path is None and last.is_file():
                cfg.ckpt_path = str(last)
            print(f"\ncell {name}", flush=True)
            if is_main_process():
                save_config(folder, cfg)
            return finite(run(cfg))
        except UnknownMetric as error:
            if new:
                shutil.rmtree(folder)
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except Exception as error:  # the other cells are still to be run
            line = error_line(error)
            report = f"{line}\n\n{traceback.format_exc()}"
            try:
                write_text(folder / "failed.txt", report)
            except OutputError as full:  # the line below is then all that is left
                print(f"error: {full}", file=sys.stderr, flush=True)
            print(f"error: {line}", file=sys.stderr, flush=True)
            return None


def check_unchanged(folder: Path, cfg: DictConfig) -> None:
    """Raises ConfigError where the cell was begun with another configuration."""
    kept = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for key in IGNORED_KEYS:
        OmegaConf.update(kept, key, None, force_add=True)
    present = OmegaConf.to_container(kept, resolve=False)
    file = folder / "cell.json"
    if not file.exists():
        if not is_main_process():
            return
        write_text(file, json.dumps(present, indent=2) + "\n")
        return
    key = difference(json.loads(file.read_text(encoding="utf-8")), present)
    if key is not None:
        raise ConfigError(
            f"study={cfg.study}: {folder} was begun with another {key}; "
            "allowed is the same configuration, another study=, or none of this folder"
        )


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """The first key below which two containers differ, or None."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = ((key, one.get(key), other.get(key)) for key in {**one, **other})
        found = (difference(a, b, f"{path}.{key}".lstrip(".")) for key, a, b in pairs)
        return next((key for key in found if key is not None), None)
    return None if one == other else path


def shortcoming(cell: Path) -> str | None:
    """Why a cell is not finished: `failed: ...`, unfinished or interrupted; None if it is."""
    failed, summary = cell / "failed.txt", cell / "summary.json"
    if failed.exists():
        return f"failed: {failed.read_text(encoding='utf-8').partition(chr(10))[0]}"
    if not summary.exists():
        return "unfinished"
    try:
        status = json.loads(summary.read_text(encoding="utf-8"))["status"]
    except (ValueError, KeyError, TypeError):
        return "unreadable: summary.json"
    return None if status == "finished" else status


def last_metric(folder: Path, name: str) -> float | None:
    """A metric of the last iteration, from `metrics.csv`, else from `summary.json`."""
    rows = read_rows(folder / "metrics.csv")
    if rows:
        value = rows[-1].get(name)
    else:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        value = summary.get("last_metrics", {}).get(name)
    return None if value is None else float(value)


def finite(value: float | None) -> float | None:
    """`value`; None, a failed trial of a search, where it is no finite number."""
    return value if value is not None and math.isfinite(value) else None


class StudyReport(Callback):
    """Tells at the end of a multirun how its study stands; exit status 1 where a cell failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        study = Path(config.hydra.sweep.dir)
        cells = sorted(file.parent for file in study.glob("*/cell.json"))
        told = {cell: shortcoming(cell) for cell in cells}
        failed = {cell: why for cell, why in told.items() if (why or "").startswith("failed")}
        finished = sum(why is None for why in told.values())
        open_ = len(cells) - finished - len(failed)
        print(f"\nStudy {study}: {finished} cells finished, {open_} not finished")
        for cell, why in failed.items():
            print(f"  failed: {cell / 'failed.txt'}: {why.removeprefix('failed: ')}")
        if failed:
            sys.exit(1)
