"""Run a multirun as a study: skip finished runs, resume interrupted ones, report failed ones.

The same command again continues a study. Several processes, also on several machines with a
shared folder, may run the same command: each run is trained by the process that locks its folder.
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

CONFIG_FILE = "study_config.json"  # the configuration with which a study began a run


def run_in_study(cfg: DictConfig, train: Callable[[DictConfig], float | None]) -> float | None:
    """Train one run of a study, or resume it from its checkpoint, unless it is finished.

    Return its optimized metric; None, a failed trial of a search, if it is not finite, if the run
    failed, or if another process trains it. A failure does not stop the study: `failed.txt` has its
    reason and traceback. Exit with status 2 for an unknown `optimized_metric`.
    """
    folder = Path(cfg.paths.output_dir)
    name = " ".join(HydraConfig.get().overrides.task)
    with claimed(folder) as locked, chdir(Path.cwd()):
        if not locked:
            print(f"\nrun {name}\n  is being trained by another process", flush=True)
            return None
        (folder / "failed.txt").unlink(missing_ok=True)
        new = not (folder / CONFIG_FILE).exists()
        try:
            check_unchanged(folder, cfg)
            if incomplete_reason(folder) is None:
                print(f"\nrun {name}\n  was finished before: {folder}", flush=True)
                value = last_metric(folder, cfg.optimized_metric)
            else:
                last = folder / "checkpoints" / "last.ckpt"
                if cfg.ckpt_path is None and last.is_file():
                    cfg.ckpt_path = str(last)
                print(f"\nrun {name}", flush=True)
                if is_main_process():
                    save_config(folder, cfg)
                value = train(cfg)
            return value if value is not None and math.isfinite(value) else None
        except UnknownMetric as error:
            if new:
                shutil.rmtree(folder)
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except Exception as error:  # continue with the next run
            line = error_line(error)
            report = f"{line}\n\n{traceback.format_exc()}"
            try:
                write_text(folder / "failed.txt", report)
            except OutputError as disk_error:
                print(f"error: {disk_error}", file=sys.stderr, flush=True)
            print(f"error: {line}", file=sys.stderr, flush=True)
            return None


def check_unchanged(folder: Path, cfg: DictConfig) -> None:
    """Raise ConfigError if the run was begun with another configuration; save it for a new run."""
    identity = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for key in IGNORED_KEYS:
        OmegaConf.update(identity, key, None, force_add=True)
    config = OmegaConf.to_container(identity, resolve=False)
    file = folder / CONFIG_FILE
    if not file.exists():
        if is_main_process():
            write_text(file, json.dumps(config, indent=2) + "\n")
        return
    key = first_difference(json.loads(file.read_text(encoding="utf-8")), config)
    if key is not None:
        raise ConfigError(
            f"study={cfg.study}: {folder} was begun with another {key}; "
            "allowed is the same configuration, another study=, or removing this folder"
        )


def first_difference(one: Any, other: Any, path: str = "") -> str | None:
    """Return the first dotted key at which two nested dictionaries differ, or None."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = ((key, one.get(key), other.get(key)) for key in {**one, **other})
        found = (first_difference(a, b, f"{path}.{key}".lstrip(".")) for key, a, b in pairs)
        return next((key for key in found if key is not None), None)
    return None if one == other else path


def incomplete_reason(folder: Path) -> str | None:
    """Return None for a finished run, else `failed: ...`, `unfinished` or its status."""
    failed, summary = folder / "failed.txt", folder / "summary.json"
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
    """Return a metric of the last iteration, from `metrics.csv` or else `summary.json`."""
    rows = read_rows(folder / "metrics.csv")
    if not rows:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        rows = [summary.get("last_metrics", {})]
    value = rows[-1].get(name)
    return None if value is None else float(value)


class StudyReport(Callback):
    """Print how many runs of a study are finished; exit with status 1 if one failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        study = Path(config.hydra.sweep.dir)
        runs = sorted(file.parent for file in study.glob(f"*/{CONFIG_FILE}"))
        reasons = {run: incomplete_reason(run) or "finished" for run in runs}
        finished = [*reasons.values()].count("finished")
        failed = {run: why for run, why in reasons.items() if why.startswith("failed")}
        remaining = len(reasons) - finished - len(failed)
        print(f"\nStudy {study}: {finished} runs finished, {remaining} not finished")
        for run, reason in failed.items():
            print(f"  failed: {run / 'failed.txt'}: {reason.removeprefix('failed: ')}")
        if failed:
            sys.exit(1)
