"""`etpo-report study=...`: runs of studies -> tables and figures over seeds and data sets."""

from math import isfinite
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from etpo.console import console_script
from etpo.errors import ConfigError
from etpo.reporting.figures import bars, learning_curves, save
from etpo.reporting.page import to_html
from etpo.reporting.read import FILES, Raw, merged, read_saved, read_studies, write_raw
from etpo.reporting.references import read_references
from etpo.reporting.render import to_console, to_latex, to_markdown
from etpo.reporting.scores import scales, score_runs
from etpo.reporting.table import cautions, make_table, method_order

DECIMALS = 6  # of table.csv


class Report(NamedTuple):
    """What a report comes to."""

    table: pd.DataFrame  # the rows of table.csv
    notes: list[str]
    folder: Path


def report(cfg: DictConfig) -> Report:
    """Reads the runs, compares their methods and writes tables and figures."""
    folders = study_folders(cfg)
    saved = None if cfg.runs is None else read_saved(Path(cfg.runs))
    raw = merged(saved, read_studies(folders) if folders else None)
    out = out_folder(cfg, folders)
    best_known = known_rewards(cfg.best_known, set(raw.summary["dataset"]))
    methods = method_order(raw.summary["method"], cfg.compare_with)
    shown = shown_methods(cfg.curves_of, methods)
    references = read_references(cfg.references)
    references = references[references["dataset"].isin(raw.summary["dataset"])]

    scale = scales(raw, best_known)
    scores = score_runs(raw, scale)
    table = make_table(scores, methods, references)
    notes = [*cautions(raw, methods), *left_out_notes(raw)]

    out.mkdir(parents=True, exist_ok=True)
    write_raw(raw, out)
    table.round(DECIMALS).to_csv(out / "table.csv", index=False, lineterminator="\n")
    (out / "table.md").write_text(to_markdown(table, scale, notes), encoding="utf-8")
    (out / "table.tex").write_text(to_latex(table), encoding="utf-8")
    curves = learning_curves(raw.runs, shown, references)
    summary = bars(table, scores, methods)
    save(curves, out / "curves")
    save(summary, out / "bars")
    page = to_html(table, scale, notes, curves, summary)
    (out / "index.html").write_text(page, encoding="utf-8")
    return Report(table, notes, out)


def study_folders(cfg: DictConfig) -> list[Path]:
    """The folders that `study` names. Raises ConfigError where one is not there."""
    if cfg.study is None and cfg.runs is None:
        raise ConfigError(
            "study=null, runs=null: allowed is a study (name or folder), the folder of a report, "
            "or both"
        )
    if cfg.study is None:
        return []
    multiruns = Path(cfg.paths.log_dir) / "train" / "multiruns"
    folders = []
    for name in cfg.study if isinstance(cfg.study, ListConfig) else [cfg.study]:
        found = [path for path in (multiruns / str(name), Path(str(name))) if path.is_dir()]
        if not found:
            known = ", ".join(sorted(path.name for path in multiruns.glob("*/"))) or "none yet"
            raise ConfigError(
                f"study={name}: no such folder; allowed is a folder or a name under {multiruns}: "
                f"{known}"
            )
        folders.append(found[0])
    return folders


def out_folder(cfg: DictConfig, folders: list[Path]) -> Path:
    """Where the report goes. Raises ConfigError where that is a file or has to be said."""
    if cfg.out is None and cfg.runs is None and len(folders) > 1:
        raise ConfigError("out=null: with several studies give out=FOLDER")
    out = Path(cfg.out or cfg.runs or folders[0])
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: allowed is a folder")
    return out


def shown_methods(curves_of: ListConfig | str | None, methods: list[str]) -> list[str]:
    """The methods of the curves, in order. Raises ConfigError for an unknown one."""
    if curves_of is None:
        return methods
    shown = [curves_of] if isinstance(curves_of, str) else list(curves_of)
    for method in shown:
        if method not in methods:
            raise ConfigError(f"curves_of={method}: allowed methods: {', '.join(methods)}")
    return shown


def known_rewards(best_known: DictConfig | None, datasets: set[str]) -> dict[str, float]:
    """`best_known` as floats. Raises ConfigError for an unknown data set or no number."""
    if best_known is None:
        return {}
    if not OmegaConf.is_dict(best_known):
        raise ConfigError(f"best_known={best_known}: allowed is {{DATASET: reward, ...}}")
    for dataset, value in best_known.items():
        if dataset not in datasets:
            allowed = ", ".join(sorted(datasets))
            raise ConfigError(f"best_known.{dataset}={value}: allowed data sets: {allowed}")
        if not isinstance(value, int | float) or not isfinite(value):
            raise ConfigError(f"best_known.{dataset}={value}: allowed is a number")
    return {dataset: float(value) for dataset, value in best_known.items()}


def left_out_notes(raw: Raw) -> list[str]:
    """One line per cell that is not in the report."""
    return [f"left out: {cell}: {reason}" for cell, reason in raw.left_out.itertuples(index=False)]


def print_report(done: Report) -> None:
    """Prints the tables, what to mind, and where the files are."""
    console = Console(highlight=False)
    for part in to_console(done.table):
        console.print(part)
    for note in done.notes:
        console.print(note, markup=False, soft_wrap=True)
    tables, figures = "table.md, table.csv, table.tex", "curves.png, bars.png (and .svg)"
    console.print(
        f"written to {done.folder}: index.html, {tables}, {figures}, {', '.join(FILES)}",
        markup=False,
        soft_wrap=True,
    )


@console_script("report")
def main(cfg: DictConfig) -> None:
    """Console script: `etpo-report study=... [key=value ...]`."""
    print_report(report(cfg))


if __name__ == "__main__":
    main()
