"""Read the results of studies, from the folders of their runs or from the files of a report."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

from etpo.config import IGNORED_KEYS
from etpo.errors import ConfigError
from etpo.studies.multirun import incomplete_reason

METRICS = (
    *("rollout/reward", "rollout/valid_rate", "val/reward"),
    *("rollout/kl_to_reference", "rollout/best_reward"),
)
KEYS = ["dataset", "method", "seed"]  # identify a run
FILES = {
    "runs.csv": [*KEYS, "iteration", "env_steps", *METRICS],
    "summary.csv": [
        *KEYS,
        *("iterations", "env_steps", "best_reward", "held_out_auc", "wall_seconds"),
    ],
    "excluded.csv": ["run", "reason"],
}
DECIMALS = 6  # of all numbers, so that a report can be repeated exactly from its files
# Overrides that name the seed, the data or the algorithm, or that do not change results.
NOT_PART_OF_METHOD = {
    *IGNORED_KEYS,
    *("seed", "environment.dataset", "environment.path", "environment.target", "algorithm"),
}


class StudyData(NamedTuple):
    """The data of a report, with the columns of `FILES`."""

    runs: pd.DataFrame  # one row per run and iteration
    summary: pd.DataFrame  # one row per run
    excluded: pd.DataFrame  # one row per run that is in neither


def read_studies(folders: Sequence[Path]) -> StudyData:
    """Read the finished runs of studies, at least one; exclude incomplete runs and duplicates."""
    runs, excluded = [], []
    for path in [p.parent for folder in folders for p in sorted(folder.glob("*/.hydra"))]:
        name, reason = f"{path.parent.name}/{path.name}", incomplete_reason(path)
        try:
            hydra = OmegaConf.load(path / ".hydra" / "hydra.yaml").hydra
            algorithm = hydra.runtime.choices.algorithm
            overrides = parse_overrides(hydra.overrides.task)
            shown = [f"{k}={v}".rstrip("=") for k, v in overrides.items() if k not in IGNORED_KEYS]
            name = " ".join([name, *shown])
            run = {"name": name, "algorithm": algorithm, "overrides": overrides}
            runs.append(run if reason else run | read_results(path))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = reason or f"unreadable: {type(error).__name__}: {error}".splitlines()[0]
        if reason is not None:
            excluded.append((name, reason))
    kept: dict[tuple, dict[str, Any]] = {}
    labels = method_labels([(run["algorithm"], run["overrides"]) for run in runs])
    for run, method in zip(runs, labels, strict=True):
        if "metrics" in run:
            key = (dataset_label(run, run["overrides"]), method, run["seed"])
            first = kept.setdefault(key, run)
            if first is not run:
                excluded.append((run["name"], f"the same run as {first['name']}"))
    if not kept:
        example = f"; {': '.join(excluded[0])}" if excluded else ""
        raise ConfigError(
            f"study={','.join(f.name for f in folders)}: allowed is a study with a finished run, "
            f"{len(excluded)} are not finished{example}"
        )
    return to_study_data(kept, excluded)


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Map the key of every override to its value; the value of `~key` is empty."""
    pairs = (argument.partition("=") for argument in arguments)
    return {key.lstrip("+"): value for key, _, value in pairs}


def read_results(folder: Path) -> dict[str, Any]:
    """Return `metrics` and keys of `summary.json` of a run; raise an error if incomplete."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    metrics = pd.read_csv(folder / "metrics.csv", float_precision="round_trip")
    if "rollout/reward" not in metrics or metrics["rollout/reward"].isna().any():
        raise ValueError("metrics.csv has an iteration without rollout/reward")
    if len(metrics) != summary["iterations"]:
        raise ValueError(
            f"metrics.csv has {len(metrics)} iterations, summary.json {summary['iterations']}"
        )
    names = ("dataset", "environment", "seed", *FILES["summary.csv"][len(KEYS) :])
    return {name: summary[name] for name in names} | {"metrics": metrics}


def method_labels(choices: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """Label each (algorithm, overrides) by the overrides that differ within its algorithm.

    An override is named by the last part of its key, or by the whole key if two such keys have the
    same last part: `etpo eta=0.3`.
    """
    differing: dict[str, set[str]] = {}
    for algorithm in {name for name, _ in choices}:
        own = [overrides for name, overrides in choices if name == algorithm]
        keys = set().union(*own) - NOT_PART_OF_METHOD
        differing[algorithm] = {k for k in keys if len({o.get(k) for o in own}) > 1}
    keys = set().union(*differing.values())
    count = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: last if count[last := key.rpartition(".")[2]] == 1 else key for key in keys}
    return [
        " ".join([name, *(f"{short[k]}={o[k]}" for k in sorted(differing[name] & o.keys()))])
        for name, o in choices
    ]


def dataset_label(summary: dict[str, Any], overrides: dict[str, str]) -> str:
    """Return the name of the data set, of a CSV file or, without a data set, of the environment."""
    if summary["dataset"] == "csv" and "environment.path" in overrides:
        return Path(overrides["environment.path"]).stem
    return summary["dataset"] or summary["environment"]


def to_study_data(runs: dict[tuple, dict[str, Any]], excluded: list[tuple[str, str]]) -> StudyData:
    """Build the tables of the `runs`, by dataset, method and seed, sorted by these."""
    curves, summaries = [], []
    for key, run in sorted(runs.items()):
        names, metrics = dict(zip(KEYS, key, strict=True)), run.pop("metrics")
        env_steps = (metrics["iteration"] + 1) * (run["env_steps"] // run["iterations"])
        curves.append(metrics.assign(**names, env_steps=env_steps))
        summaries.append(run | names)
    columns = FILES["summary.csv"]
    # a missing held-out score, None, becomes nan
    summary = pd.DataFrame(summaries)[columns].astype(dict.fromkeys(columns[-3:], float))
    return StudyData(
        pd.concat(curves, ignore_index=True).reindex(columns=FILES["runs.csv"]).round(DECIMALS),
        summary.round(DECIMALS),
        pd.DataFrame(excluded, columns=FILES["excluded.csv"]),
    )


def write_study_data(data: StudyData, folder: Path) -> None:
    """Write the files that `read_report` reads."""
    for name, table in zip(FILES, data, strict=True):
        table.to_csv(folder / name, index=False, lineterminator="\n")


def read_report(folder: Path) -> StudyData:
    """Read the files of an earlier report; raise ConfigError if a file or a column is missing."""
    tables = []
    for name, columns in FILES.items():
        file, types = folder / name, {"dataset": str, "method": str}
        if not file.is_file():
            raise ConfigError(
                f"runs={folder}: no {name}; allowed is the folder of a report, with "
                f"{', '.join(FILES)}"
            )
        table = pd.read_csv(file, float_precision="round_trip", dtype=types)
        for column in columns:
            if column not in table:
                raise ConfigError(f"runs={folder}: {name} lacks the column {column}")
        tables.append(table[columns])
    return StudyData(*tables)


def merge(saved: StudyData | None, fresh: StudyData | None) -> StudyData:
    """Add the runs of `fresh` that are not in `saved`; keep the excluded runs of `fresh`."""
    if saved is None or fresh is None:
        return saved or fresh
    known = pd.MultiIndex.from_frame(saved.summary[KEYS])
    joined = []
    for old, new in ((saved.runs, fresh.runs), (saved.summary, fresh.summary)):
        new = new[~pd.MultiIndex.from_frame(new[KEYS]).isin(known)]
        joined.append(pd.concat([old, new]).sort_values(KEYS, kind="stable", ignore_index=True))
    return StudyData(*joined, fresh.excluded)


def read_references(path: str | None) -> pd.DataFrame:
    """Read the ROC AUC of reference models: columns dataset, model, auc.

    The CSV file has the columns `name`, the data set, and for every model M its mean ROC AUC `M`,
    and `M_std`. Other columns are ignored.
    """
    columns = ["dataset", "model", "auc"]
    if path is None:
        return pd.DataFrame(columns=columns)
    if not Path(path).is_file():
        raise ConfigError(f"references={path}: no such file; allowed is a CSV file")
    try:
        wide = pd.read_csv(path)
    except ValueError as error:
        raise ConfigError(f"references={path}: {str(error).splitlines()[0]}") from error
    models = [name for name in wide if f"{name}_std" in wide]
    if "name" not in wide or not models:
        raise ConfigError(
            f"references={path}: allowed is a table with the column name and, for every model, "
            "MODEL and MODEL_std"
        )
    for model in wide[models].select_dtypes(exclude="number"):
        raise ConfigError(f"references={path}: column {model} has a value that is not a number")
    long = wide.melt("name", models, "model", "auc").rename(columns={"name": "dataset"})
    return long.dropna()[columns]
