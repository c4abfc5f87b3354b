"""`etpo-report study=...`: compare the runs of studies over seeds and data sets."""

from math import isfinite
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from etpo.console import console_script
from etpo.errors import ConfigError
from etpo.studies import figures, read, tables
from etpo.studies.scores import scales, score_runs

DECIMALS = 6  # of table.csv


def report(cfg: DictConfig) -> None:
    """Compare the methods of the runs; write and print tables, write figures."""
    folders = study_folders(cfg)
    saved = None if cfg.runs is None else read.read_report(Path(cfg.runs))
    data = read.merge(saved, read.read_studies(folders) if folders else None)
    if cfg.out is None and cfg.runs is None and len(folders) > 1:
        raise ConfigError("out=null: with several studies give out=FOLDER")
    out = Path(cfg.out or cfg.runs or folders[0])
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: allowed is a folder")
    datasets = set(data.summary["dataset"])
    scale = scales(data, known_rewards(cfg.best_known, datasets))
    methods = tables.method_order(data.summary["method"], cfg.compare_with)
    shown = as_list(cfg.curves_of) or methods
    for method in shown:
        if method not in methods:
            raise ConfigError(f"curves_of={method}: allowed methods: {', '.join(methods)}")
    references = read.read_references(cfg.references)
    references = references[references["dataset"].isin(datasets)]

    scores = score_runs(data, scale)
    table = tables.make_table(scores, methods, references)
    excluded = [f"excluded: {run}: {reason}" for run, reason in data.excluded.to_numpy()]
    notes = [*tables.warnings(data, methods), *excluded]
    curves = figures.learning_curves(data.runs, shown, references)
    bars = figures.bars(table, scores, methods)

    out.mkdir(parents=True, exist_ok=True)
    read.write_study_data(data, out)
    table.round(DECIMALS).to_csv(out / "table.csv", index=False, lineterminator="\n")
    figures.save(curves, out / "curves")
    figures.save(bars, out / "bars")
    drawings = figures.inline_svg(curves), figures.inline_svg(bars)
    pages = {
        "index.html": tables.to_html(table, scale, notes, *drawings),
        "table.md": tables.to_markdown(table, scale, notes),
        "table.tex": tables.to_latex(table),
    }
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    files = ", ".join([*pages, "table.csv", "curves.png", "bars.png (and .svg)", *read.FILES])
    print(tables.to_console(table), *notes, f"written to {out}: {files}", sep="\n")


def study_folders(cfg: DictConfig) -> list[Path]:
    """Return the folders of `study`; raise ConfigError if one does not exist."""
    if cfg.study is None and cfg.runs is None:
        raise ConfigError(
            "study=null, runs=null: allowed is a study (name or folder), the folder of a report, "
            "or both"
        )
    multiruns = Path(cfg.paths.log_dir) / "train" / "multiruns"
    folders = []
    for name in as_list(cfg.study):
        found = [path for path in (multiruns / name, Path(name)) if path.is_dir()]
        if not found:
            known = ", ".join(sorted(path.name for path in multiruns.glob("*/"))) or "none yet"
            raise ConfigError(
                f"study={name}: no such folder; allowed is a folder or a name under {multiruns}: "
                f"{known}"
            )
        folders.append(found[0])
    return folders


def as_list(value: object) -> list[str]:
    """Return a config value that is null, one value or a list as a list of texts."""
    values = value if isinstance(value, ListConfig) else [value]
    return [str(v) for v in values if v is not None]


def known_rewards(best_known: object, datasets: set[str]) -> dict[str, float]:
    """Return `best_known`; raise ConfigError for an unknown data set or no finite number."""
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
    return dict(best_known)


@console_script("report")
def main(cfg: DictConfig) -> None:
    """Console script: `etpo-report study=... [key=value ...]`."""
    report(cfg)


if __name__ == "__main__":
    main()
