"""Raw numbers of studies: from the folders of their cells, or from an earlier report's files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

from etpo.errors import ConfigError
from etpo.reporting.labels import dataset_label, method_labels, overrides_of
from etpo.study import shortcoming

METRICS = (
    "rollout/reward",
    "rollout/valid_rate",
    "val/reward",
    "rollout/kl_to_reference",
    "rollout/best_reward",
)
# columns of runs.csv where a run has them
OPTIONAL = (
    "critic/unsampled_advantage",
    "critic/unsampled_advantage_used",
    "policy/unsampled_before",
    "policy/unsampled_after",
)
RUN = ["dataset", "method", "seed"]  # what names a run
RUN_COLUMNS = [*RUN, "iteration", "env_steps", *METRICS]
SUMMARY_COLUMNS = [*RUN, "iterations", "env_steps", "best_reward", "held_out_auc", "wall_seconds"]
LEFT_OUT_COLUMNS = ["cell", "reason"]
FILES = {
    "runs.csv": RUN_COLUMNS,
    "summary.csv": SUMMARY_COLUMNS,
    "left_out.csv": LEFT_OUT_COLUMNS,
}
DECIMALS = 6  # of every number, so that the files give back exactly what the report was made from


class Raw(NamedTuple):
    """What a report is made from, with the columns of FILES."""

    runs: pd.DataFrame  # a row per run and iteration
    summary: pd.DataFrame  # a row per run
    left_out: pd.DataFrame  # a row per cell that is in neither


class Cell(NamedTuple):
    """A cell of a study as it lies on disk."""

    name: str
    algorithm: str
    overrides: dict[str, str]
    summary: dict[str, Any]
    metrics: pd.DataFrame


def read_studies(folders: Sequence[Path]) -> Raw:
    """The finished cells of the studies; the others, and runs that come twice, are left out.

    Raises ConfigError where no cell is finished.
    """
    cells, left_out = [], []
    paths = [p for f in folders for p in sorted(file.parent for file in f.glob("*/.hydra"))]
    for path in paths:
        reason, cell = shortcoming(path), None
        if reason is None:
            try:
                cell = read_cell(path)
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                reason = f"unreadable: {type(error).__name__}: {error}".splitlines()[0]
        if cell is None:
            left_out.append((cell_name(path), reason))
        else:
            cells.append(cell)
    if not cells:
        told = f"; {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
        raise ConfigError(
            f"study={','.join(f.name for f in folders)}: allowed is a study with a finished cell, "
            f"{len(left_out)} are not finished{told}"
        )
    others = [choices for path in paths if (choices := choices_of(path)) is not None]
    labels = method_labels([(c.algorithm, c.overrides) for c in cells], others)
    kept: dict[tuple, Cell] = {}
    for cell, method in zip(cells, labels, strict=True):
        run = (dataset_label(cell.summary, cell.overrides), method, cell.summary["seed"])
        if run in kept:
            left_out.append((cell.name, f"the same run as {kept[run].name}"))
        else:
            kept[run] = cell
    return to_raw(kept, left_out)


def to_raw(kept: dict[tuple, Cell], left_out: list[tuple[str, str]]) -> Raw:
    """The tables of the runs `kept` under dataset, method and seed, sorted by these."""
    runs, summaries = [], []
    optional = [name for name in OPTIONAL if any(name in c.metrics for c in kept.values())]
    for run, cell in sorted(kept.items()):
        names = dict(zip(RUN, run, strict=True))
        columns = ["iteration", *METRICS, *optional]
        metrics = cell.metrics.reindex(columns=columns).assign(**names)
        per_iteration = cell.summary["env_steps"] // cell.summary["iterations"]
        metrics["env_steps"] = (metrics["iteration"] + 1) * per_iteration
        runs.append(metrics[[*RUN_COLUMNS, *optional]])
        summaries.append({**cell.summary, **names})
    summary = pd.DataFrame(summaries)[SUMMARY_COLUMNS]
    # None, of a run without a held-out score, becomes nan
    summary = summary.astype(dict.fromkeys(SUMMARY_COLUMNS[-3:], float))
    return Raw(
        pd.concat(runs, ignore_index=True).round(DECIMALS),
        summary.round(DECIMALS),
        pd.DataFrame(left_out, columns=LEFT_OUT_COLUMNS),
    )


def cell_name(cell: Path) -> str:
    """Study, cell and, where they are known, its overrides."""
    file = cell / ".hydra" / "overrides.yaml"
    overrides = OmegaConf.load(file) if file.is_file() else []
    told = [o for o in overrides if o.partition("=")[0] not in ("study", "environment.score_cache")]
    return " ".join([f"{cell.parent.name}/{cell.name}", *told])


def read_cell(cell: Path) -> Cell:
    """A finished cell. Raises OSError, ValueError, KeyError or OmegaConf's AttributeError."""
    algorithm, overrides = read_choices(cell)
    summary = json.loads((cell / "summary.json").read_text(encoding="utf-8"))
    metrics = pd.read_csv(cell / "metrics.csv", float_precision="round_trip")
    if "rollout/reward" not in metrics or metrics["rollout/reward"].isna().any():
        raise ValueError("metrics.csv has an iteration without rollout/reward")
    if len(metrics) != summary["iterations"]:
        raise ValueError(
            f"metrics.csv has {len(metrics)} iterations, summary.json {summary['iterations']}"
        )
    summary = {key: summary[key] for key in ("dataset", "environment", *SUMMARY_COLUMNS[2:])}
    return Cell(cell_name(cell), algorithm, overrides, summary, metrics)


def read_choices(cell: Path) -> tuple[str, dict[str, str]]:
    """Algorithm and overrides of a cell. Raises OSError or OmegaConf's AttributeError."""
    hydra = OmegaConf.load(cell / ".hydra" / "hydra.yaml").hydra
    return hydra.runtime.choices.algorithm, overrides_of(hydra.overrides.task)


def choices_of(cell: Path) -> tuple[str, dict[str, str]] | None:
    """`read_choices`, None where they cannot be read."""
    try:
        return read_choices(cell)
    except (OSError, ValueError, AttributeError):
        return None


def write_raw(raw: Raw, folder: Path) -> None:
    """Writes the files that `read_saved` reads."""
    for name, table in zip(FILES, raw, strict=True):
        table.to_csv(folder / name, index=False, lineterminator="\n")


def read_saved(folder: Path) -> Raw:
    """What an earlier report wrote. Raises ConfigError where a file or a column is missing."""
    tables = []
    for name, columns in FILES.items():
        file = folder / name
        if not file.is_file():
            raise ConfigError(
                f"runs={folder}: no {name}; allowed is a folder with {', '.join(FILES)}, "
                "which etpo-report wrote"
            )
        table = pd.read_csv(
            file, float_precision="round_trip", dtype=dict.fromkeys(["dataset", "method"], str)
        )
        missing = [column for column in columns if column not in table]
        if missing:
            raise ConfigError(f"runs={folder}: {name} lacks the column {missing[0]}")
        tables.append(table[[*columns, *(name for name in OPTIONAL if name in table)]])
    return Raw(*tables)


def merged(saved: Raw | None, fresh: Raw | None) -> Raw:
    """The runs of an earlier report and those of a study that it has not; what is left out now.

    At most one of them may be None.
    """
    if saved is None or fresh is None:
        return saved or fresh
    known = set(saved.summary[RUN].itertuples(index=False, name=None))

    def join(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
        unknown = [run not in known for run in new[RUN].itertuples(index=False, name=None)]
        return pd.concat([old, new[unknown]]).sort_values(RUN, kind="stable", ignore_index=True)

    runs = join(saved.runs, fresh.runs)
    return Raw(runs, join(saved.summary, fresh.summary), fresh.left_out)
