"""The tables of a report: estimates per data set and method, as numbers and as formatted text."""

from collections.abc import Callable, Sequence

import pandas as pd
from rich.table import Table
from rich.text import Text

from etpo.errors import ConfigError
from etpo.studies.read import StudyData
from etpo.studies.statistics import Estimate, iqm_estimate, probability_of_improvement

PER_DATASET = (
    *("final", "greedy", "best", "held_out_auc", "area", "steps_95", "steps_90", "seconds"),
    *("final_normalised", "greedy_normalised"),
)
OVERALL = ("final_normalised", "greedy_normalised", "area")
COMPARED = ("final_normalised", "area")  # scores with a probability of improvement
COUNTS = ("reached_95", "reached_90", "collapses")  # of runs
ALL_DATASETS = "All data sets"

Column = Callable[[pd.Series], str]


def method_order(methods: pd.Series, compare_with: str | None) -> list[str]:
    """Return the methods by name, after the one that others are compared with.

    Raises:
        ConfigError: No run has the method `compare_with`.
    """
    names = sorted(set(methods))
    if compare_with is not None and compare_with not in names:
        raise ConfigError(f"compare_with={compare_with}: allowed: {', '.join(names)}")
    first = compare_with or ("etpo" if "etpo" in names else names[0])
    return [first, *(name for name in names if name != first)]


def make_table(scores: pd.DataFrame, methods: list[str], references: pd.DataFrame) -> pd.DataFrame:
    """Compute the rows of `table.csv`; an estimate x has the columns x, x_low and x_high.

    The column `kind` is `method` for a method on a data set, `reference` for the ROC AUC of a
    reference model on a data set, and `all` for a method over all data sets.
    """
    rows = []
    for dataset, runs in scores.groupby("dataset"):
        for method in methods:
            own = runs[runs["method"] == method]
            if len(own):
                rows.append(dataset_row(own) | {"dataset": dataset, "method": method})
        for model in references[references["dataset"] == dataset].itertuples():
            row = {"kind": "reference", "dataset": dataset, "method": model.model}
            rows.append(row | {"held_out_auc": model.auc})
    rows += [overall_row(scores, method, methods[0]) for method in methods]
    return pd.DataFrame(rows).astype(dict.fromkeys(["seeds", "datasets", *COUNTS], "Int64"))


def dataset_row(runs: pd.DataFrame) -> dict[str, object]:
    """Estimate the scores of one method on one data set over its seeds."""
    row = {"kind": "method", "dataset": None, "method": None, "seeds": len(runs)}
    for name in PER_DATASET:
        row |= columns_of(name, iqm_estimate([runs[name].dropna().to_numpy()]))
    return row | {name: int(runs[name].sum()) for name in COUNTS}


def overall_row(scores: pd.DataFrame, method: str, compared: str) -> dict[str, object]:
    """Estimate the scores of a method over all data sets, and its improvement on `compared`."""
    own, other = (
        dict(list(scores[scores["method"] == name].groupby("dataset")))
        for name in (method, compared)
    )
    row = {"kind": "all", "dataset": "all", "method": method}
    row |= {"seeds": sum(map(len, own.values())), "datasets": len(own)}
    for name in OVERALL:
        row |= columns_of(name, iqm_estimate([r[name].dropna().to_numpy() for r in own.values()]))
    shared = [dataset for dataset in own if dataset in other and method != compared]
    for name in COMPARED:
        pairs = [(own[d][name].to_numpy(), other[d][name].to_numpy()) for d in shared]
        row |= columns_of(f"improves_{name}", probability_of_improvement(pairs))
    return row | {"collapses": int(sum(runs["collapses"].sum() for runs in own.values()))}


def columns_of(name: str, estimate: Estimate) -> dict[str, float]:
    """Return the three columns of an estimate."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def warnings(data: StudyData, methods: list[str]) -> list[str]:
    """Return one sentence per reason why rows of the table are not comparable."""
    sentences = []
    for dataset, steps in data.summary.groupby("dataset")["env_steps"]:
        low, high = steps.min(), steps.max()
        if low != high:
            sentences.append(
                f"{dataset}: runs have {low} to {high} actions; the curve area covers the first "
                f"{low}, the final reward is from the end of each run"
            )
    datasets = data.summary.groupby("method")["dataset"].agg(set)
    sentences += [
        f"{method} and {methods[0]} were not run on the same data sets"
        for method in methods[1:]
        if datasets[method] != datasets[methods[0]]
    ]
    return sentences


def estimate(name: str, digits: int = 3) -> Column:
    """Format `value [low, high]`, the value alone without an interval, `-` if unknown."""

    def show(row: pd.Series) -> str:
        if pd.isna(row[name]):
            return "-"
        if pd.isna(row.get(f"{name}_low")):
            return f"{row[name]:.{digits}f}"
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    return show


def steps(name: str, reached: str) -> Column:
    """Format an estimate of actions; add `≥` and the share of seeds unless all reached it."""

    def show(row: pd.Series) -> str:
        if pd.isna(row[name]):
            return "-"
        count, seeds = int(row[reached]), int(row["seeds"])
        if count == seeds:
            return estimate(name, 0)(row)
        return f"≥ {estimate(name, 0)(row)} ({count}/{seeds})" if count else f"- (0/{seeds})"

    return show


def count(name: str) -> Column:
    """Format an integer; `-` if unknown."""
    return lambda row: "-" if pd.isna(row[name]) else str(int(row[name]))


def method_name(row: pd.Series) -> str:
    return row["method"] + (" (reference)" if row["kind"] == "reference" else "")


DATASET_COLUMNS: dict[str, Column] = {
    "method": method_name,
    "seeds": count("seeds"),
    "final reward": estimate("final"),
    "greedy reward": estimate("greedy"),
    "best reward": estimate("best"),
    "held-out AUC": estimate("held_out_auc"),
    "curve area": estimate("area"),
    "actions to 95%": steps("steps_95", "reached_95"),
    "actions to 0.9": steps("steps_90", "reached_90"),
    "collapses": count("collapses"),
    "seconds": estimate("seconds", 0),
}
OVERALL_COLUMNS: dict[str, Column] = {
    "method": method_name,
    "data sets": count("datasets"),
    "runs": count("seeds"),
    "final score": estimate("final_normalised"),
    "greedy score": estimate("greedy_normalised"),
    "curve area": estimate("area"),
    "P(final above {})": estimate("improves_final_normalised", 2),
    "P(area above {})": estimate("improves_area", 2),
    "collapses": count("collapses"),
}


def formatted(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Format the table as text, one part per data set and one over all of them, by title."""

    def part(rows: pd.DataFrame, columns: dict[str, Column]) -> pd.DataFrame:
        return pd.DataFrame({title: rows.apply(show, axis=1) for title, show in columns.items()})

    overall = table[table["kind"] == "all"]
    compared = overall["method"].iloc[0]
    columns = {title.format(compared): show for title, show in OVERALL_COLUMNS.items()}
    datasets = table[table["kind"] != "all"].groupby("dataset")
    parts = {dataset: part(rows, DATASET_COLUMNS) for dataset, rows in datasets}
    return parts | {ALL_DATASETS: part(overall, columns)}


def scale_line(scale: pd.DataFrame, dataset: str) -> str:
    """Describe the ends of a data set's normalised scale; empty for all data sets."""
    if dataset not in scale.index:
        return ""
    first, best = scale.loc[dataset, ["first", "best_known"]]
    return f"Scores: 0 is a reward of {first:.3f}, 1 is {best:.3f}."


def to_markdown(table: pd.DataFrame, scale: pd.DataFrame, notes: Sequence[str]) -> str:
    """Render every part of the table, its scale and the notes."""
    lines = ["Interquartile mean over seeds [95% bootstrap interval]."]
    for title, part in formatted(table).items():
        lines += ["", f"## {title}", "", *filter(None, [scale_line(scale, title)])]
        rows = [part.columns, ["---"] * len(part.columns), *part.to_numpy()]
        lines += ["", *(f"| {' | '.join(c.replace('|', '\\|') for c in row)} |" for row in rows)]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame) -> str:
    """Render every part of the table as a tabular for the package booktabs."""
    parts = []
    for title, part in formatted(table).items():
        style = pd.concat({title: part}, axis=1).style.hide(axis="index").format(escape="latex")
        parts.append(
            style.format_index(escape="latex", axis=1).to_latex(
                column_format="l" + "r" * (len(part.columns) - 1), hrules=True, multicol_align="l"
            )
        )
    return "\n".join(parts).replace("≥", r"$\geq$")


def to_console(table: pd.DataFrame) -> list[Table]:
    """Render the main columns, per data set and over all, for a console of 80 columns."""
    parts = formatted(table[table["kind"] != "reference"])
    overall = parts.pop(ALL_DATASETS)
    per_dataset = pd.concat(parts, names=["data set"]).reset_index("data set")
    names = ["data set", "method", "seeds", "final reward", "held-out AUC", "curve area", "collapses"]
    final, compared = "final score", overall.columns[OVERALL_INDEX]
    return [
        console_table(per_dataset[names]),
        console_table(overall[["method", "runs", "final score", "curve area", compared]]),
    ]


def console_table(part: pd.DataFrame) -> Table:
    """Build a table that aligns numbers to the right and folds long names."""
    short = {"held-out AUC": "held out", "curve area": "area"}  # without interval
    rendered = Table(box=None, padding=(0, 1, 0, 0))
    for title, cells in part.items():
        left = title in ("data set", "method")
        if title in short:
            cells = [cell.partition(" [")[0] for cell in cells]
        part[title] = cells
