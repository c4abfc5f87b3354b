"""The tables of a report: estimates per data set and method, as numbers and as formatted text."""

from collections.abc import Iterable, Sequence

import pandas as pd
from markupsafe import Markup

from etpo.errors import ConfigError
from etpo.studies.pages import render
from etpo.studies.read import StudyData
from etpo.studies.statistics import iqm_estimate, probability_of_improvement

# title: column of table.csv, decimals
DATASET_COLUMNS = {
    "method": ("method", 0),
    "seeds": ("seeds", 0),
    "final reward": ("final", 3),
    "greedy reward": ("greedy", 3),
    "best reward": ("best", 3),
    "held-out AUC": ("held_out_auc", 3),
    "curve area": ("area", 3),
    "actions to 95%": ("steps_95", 0),
    "actions to 0.9": ("steps_90", 0),
    "collapses": ("collapses", 0),
    "seconds": ("seconds", 0),
}
OVERALL_COLUMNS = {
    "method": ("method", 0),
    "data sets": ("datasets", 0),
    "runs": ("seeds", 0),
    "final score": ("final_normalised", 3),
    "greedy score": ("greedy_normalised", 3),
    "curve area": ("area", 3),
    "P(final above {})": ("improves_final_normalised", 2),
    "P(area above {})": ("improves_area", 2),
    "collapses": ("collapses", 0),
}
OVERALL_TITLE = "All data sets"


def method_order(methods: pd.Series, compare_with: str | None) -> list[str]:
    """Return `compare_with`, by default `etpo` or the first by name, then the others by name."""
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
    rows, counts = [], list(scores.select_dtypes(bool))
    names = [*scores.select_dtypes(float), *counts]
    for dataset, runs in scores.groupby("dataset"):
        for method in methods:
            own = runs[runs["method"] == method]
            if len(own):
                rows.append(estimate_row("method", dataset, method, [own], names))
        for _, model, auc in references[references["dataset"] == dataset].itertuples(index=False):
            row = {"kind": "reference", "dataset": dataset, "method": model}
            rows.append(row | {"held_out_auc": auc})
    rows += [overall_row(scores, method, methods[0]) for method in methods]
    return pd.DataFrame(rows).astype(dict.fromkeys(["seeds", "datasets", *counts], "Int64"))


def estimate_row(
    kind: str, dataset: str, method: str, strata: list[pd.DataFrame], names: Sequence[str]
) -> dict[str, object]:
    """Estimate the scores `names` of a method over the runs of all strata; count true values."""
    row = {"kind": kind, "dataset": dataset, "method": method, "seeds": sum(map(len, strata))}
    for name in names:
        values = [runs[name].dropna().to_numpy() for runs in strata]
        if values[0].dtype == bool:
            row[name] = sum(int(v.sum()) for v in values)
        else:
            row |= iqm_estimate(values).columns(name)
    return row


def overall_row(scores: pd.DataFrame, method: str, compared: str) -> dict[str, object]:
    """Estimate the scores of a method over all data sets, and its improvement on `compared`."""
    own, other = (
        dict(list(scores[scores["method"] == name].groupby("dataset")))
        for name in (method, compared)
    )
    names = ["final_normalised", "greedy_normalised", "area", "collapses"]
    row = estimate_row("all", "all", method, list(own.values()), names) | {"datasets": len(own)}
    shared = [dataset for dataset in own if dataset in other and method != compared]
    for name in ("final_normalised", "area"):
        pairs = [(own[d][name].to_numpy(), other[d][name].to_numpy()) for d in shared]
        row |= probability_of_improvement(pairs).columns(f"improves_{name}")
    return row


def warnings(data: StudyData, methods: list[str]) -> list[str]:
    """Return one sentence per reason why rows of the table are not comparable."""
    steps = data.summary.groupby("dataset")["env_steps"].agg(["min", "max"])
    sentences = [
        f"{dataset}: runs have {low} to {high} actions; the curve area covers the first {low}, the "
        "final reward is from the end of each run"
        for dataset, low, high in steps.itertuples(name=None)
        if low != high
    ]
    datasets = data.summary.groupby("method")["dataset"].agg(set)
    return sentences + [
        f"{method} and {methods[0]} were not run on the same data sets"
        for method in methods[1:]
        if datasets[method] != datasets[methods[0]]
    ]


def formatted(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Format the table as text, one part per data set and one over all of them, by title."""
    overall = table[table["kind"] == "all"]
    compared = overall["method"].iloc[0]
    columns = {title.format(compared): column for title, column in OVERALL_COLUMNS.items()}
    parts = table[table["kind"] != "all"].groupby("dataset")
    shown = {dataset: format_rows(rows, DATASET_COLUMNS) for dataset, rows in parts}
    return shown | {OVERALL_TITLE: format_rows(overall, columns)}


def format_rows(rows: pd.DataFrame, columns: dict[str, tuple[str, int]]) -> pd.DataFrame:
    """Format one part of the table; the columns are titles."""
    return pd.DataFrame(
        {title: format_cell(row, *column) for title, column in columns.items()}
        for _, row in rows.iterrows()
    )


def format_cell(row: pd.Series, name: str, digits: int) -> str:
    """Format a name, a count or an estimate, `value [low, high]`; `-` if unknown.

    Actions to a reward have `≥` and the share of seeds that reached it unless all did.
    """
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if isinstance(value, str):
        return value + (" (reference)" if row["kind"] == "reference" else "")
    if pd.isna(value):
        return "-"
    text = f"{value:.{digits}f}"
    if not pd.isna(low):
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    reached, seeds = row.get(name.replace("steps", "reached")), row["seeds"]
    if not name.startswith("steps") or reached == seeds:
        return text
    return f"≥ {text} ({reached}/{seeds})" if reached else f"- (0/{seeds})"


def scale_line(scale: pd.DataFrame, dataset: str) -> str:
    """Describe the ends of a data set's normalised scale."""
    first, best = scale.loc[dataset, ["first", "best_known"]]
    return f"Scores: 0 is a reward of {first:.3f}, 1 is {best:.3f}."


def to_markdown(table: pd.DataFrame, scale: pd.DataFrame, notes: Sequence[str]) -> str:
    """Render the table, the scales and the notes."""
    lines = ["Interquartile mean over seeds [95% bootstrap interval]."]
    for title, part in formatted(table).items():
        lines += ["", f"## {title}", ""]
        if title in scale.index:
            lines += [scale_line(scale, title), ""]
        lines += markdown_table(part.columns, part.to_numpy())
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def to_html(
    table: pd.DataFrame, scale: pd.DataFrame, notes: Sequence[str], curves: Markup, bars: Markup
) -> str:
    """Render the content of `table.md` and both figures as one page; equal input, equal text."""
    own = table[table["kind"] == "method"]
    methods, datasets = (", ".join(own[name].unique()) for name in ("method", "dataset"))
    return render(
        "report.html.j2",
        facts=f"{own['seeds'].sum()} runs of {methods} on {datasets}.",
        parts=formatted(table),
        scales={dataset: scale_line(scale, dataset) for dataset in scale.index},
        curves=curves,
        bars=bars,
        notes=notes,
    )


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [
        [str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row]
        for row in (titles, ["---"] * len(titles), *rows)
    ]
    return [f"| {' | '.join(row)} |" for row in cells]


def to_latex(table: pd.DataFrame) -> str:
    """Render the table as one tabular per part, for the package booktabs."""
    parts = []
    for title, part in formatted(table).items():
        style = pd.concat({title: part}, axis=1).style.hide(axis="index")
        style = style.format(escape="latex").format_index(escape="latex", axis=1)
        alignment = "l" + "r" * (len(part.columns) - 1)
        parts.append(style.to_latex(column_format=alignment, hrules=True, multicol_align="l"))
    return "\n".join(parts).replace("≥", r"$\geq$")


def to_console(table: pd.DataFrame) -> str:
    """Render the main columns, per data set and over all data sets."""
    parts = {
        title: part.set_axis(part["method"].to_numpy())
        for title, part in formatted(table[table["kind"] != "reference"]).items()
    }
    overall = parts.pop(OVERALL_TITLE)
    compared = f"P(final above {overall.index[0]})"
    datasets = pd.concat(parts)[
        ["seeds", "final reward", "held-out AUC", "curve area", "collapses"]
    ]
    overall = overall[["runs", "final score", "curve area", compared]]
    intervals = dict.fromkeys(["held-out AUC", "curve area"], r" \[.*")  # not shown
    shown = (part.replace(intervals, "", regex=True) for part in (datasets, overall))
    return "\n\n".join(part.to_string() for part in shown)
