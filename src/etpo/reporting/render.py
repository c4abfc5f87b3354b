"""The table of a report as Markdown, LaTeX and a table of the console."""

from collections.abc import Callable, Sequence

import pandas as pd
from rich.markup import escape
from rich.table import Table

Cell = Callable[[pd.Series], str]


def estimate(name: str, digits: int = 3, with_interval: bool = True) -> Cell:
    """Shows `value [low, high]`, or the value alone; `-` where unknown."""

    def show(row: pd.Series) -> str:
        value, low, high = (row.get(name + end, float("nan")) for end in ("", "_low", "_high"))
        if pd.isna(value):
            return "-"
        if pd.isna(low) or not with_interval:
            return f"{value:.{digits}f}"
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    return show


def steps(name: str, reached: str) -> Cell:
    """The estimate of actions; `≥` and how many seeds got there where not all did."""

    def show(row: pd.Series) -> str:
        if row["kind"] == "reference" or pd.isna(row[name]):
            return "-"
        count, seeds = int(row[reached]), int(row["seeds"])
        if count == seeds:
            return estimate(name, 0)(row)
        return f"≥ {estimate(name, 0)(row)} ({count}/{seeds})" if count else f"- (0/{seeds})"

    return show


def count(name: str) -> Cell:
    """A whole number; `-` where unknown."""
    return lambda row: "-" if pd.isna(row.get(name)) else str(int(row[name]))


def method(row: pd.Series) -> str:
    return row["method"] + (" (reference)" if row["kind"] == "reference" else "")


DATASET_COLUMNS: dict[str, Cell] = {
    "method": method,
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
# what fits a console of 80 columns
CONSOLE_COLUMNS: dict[str, Cell] = {
    "data set": lambda row: row["dataset"],
    "method": method,
    "seeds": count("seeds"),
    "final reward": estimate("final"),
    "held out": estimate("held_out_auc", with_interval=False),
    "area": estimate("area", with_interval=False),
    "falls": count("collapses"),
}


def overall_columns(compared: str) -> dict[str, Cell]:
    """The columns of the rows over all data sets."""
    return {
        "method": method,
        "data sets": count("datasets"),
        "runs": count("seeds"),
        "final score": estimate("final_normalised"),
        "greedy score": estimate("greedy_normalised"),
        "curve area": estimate("area"),
        f"P(final above {compared})": estimate("improves_final_normalised", 2),
        f"P(area above {compared})": estimate("improves_area", 2),
        "collapses": count("collapses"),
    }


def blocks(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, dict[str, Cell]]]:
    """Title, rows and columns of every part of the table, the one over all data sets last."""
    overall = table[table["kind"] == "all"]
    parts = [
        (dataset, rows, DATASET_COLUMNS)
        for dataset, rows in table[table["kind"] != "all"].groupby("dataset")
    ]
    return [*parts, ("All data sets", overall, overall_columns(overall["method"].iloc[0]))]


def texts(rows: pd.DataFrame, columns: dict[str, Cell]) -> list[list[str]]:
    """The cells of every row."""
    return [[show(row) for show in columns.values()] for _, row in rows.iterrows()]


def to_markdown(table: pd.DataFrame, scale: pd.DataFrame, notes: Sequence[str]) -> str:
    """One table per data set with its scale, one over all, and what to mind."""
    lines = ["Interquartile mean over seeds [95% bootstrap interval]."]
    for title, rows, columns in blocks(table):
        lines += ["", f"## {title}", ""]
        if title in scale.index:
            lines += [scale_line(scale, title), ""]
        lines += [markdown_row(columns), markdown_row(["---"] * len(columns))]
        lines += [markdown_row(cells) for cells in texts(rows, columns)]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def scale_line(scale: pd.DataFrame, dataset: str) -> str:
    """What the ends of a data set's normalised scale are."""
    first, best = scale.loc[dataset, ["first", "best_known"]]
    return f"Scores: 0 is a reward of {first:.3f}, 1 is {best:.3f}."


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_latex(table: pd.DataFrame) -> str:
    """A tabular per data set and one over all, for the package booktabs."""
    lines = []
    for title, rows, columns in blocks(table):
        head = " & ".join(map(latex, columns))
        lines += [f"% {title}", rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\toprule"]
        lines += [rf"\multicolumn{{{len(columns)}}}{{l}}{{{latex(title)}}} \\", r"\midrule"]
        lines += [rf"{head} \\", r"\midrule"]
        lines += [rf"{' & '.join(map(latex, cells))} \\" for cells in texts(rows, columns)]
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def latex(text: str) -> str:
    """`text` with LaTeX's special characters escaped."""
    escaped = text.replace("\\", r"\textbackslash{}")
    for character in "&%$#_":
        escaped = escaped.replace(character, "\\" + character)
    return escaped.replace("~", r"\textasciitilde{}").replace("≥", r"$\geq$")


def to_console(table: pd.DataFrame) -> list[Table]:
    """The most telling columns of the methods, per data set and over all."""
    overall = table[table["kind"] == "all"]
    overall_columns = {
        "over all data sets": method,
        "runs": count("seeds"),
        "final score": estimate("final_normalised"),
        "area": estimate("area", with_interval=False),
        f"P(final > {overall['method'].iloc[0]})": estimate("improves_final_normalised", 2),
    }
    per_dataset = table[table["kind"] == "method"]
    return [
        console_table(per_dataset, CONSOLE_COLUMNS),
        console_table(overall, overall_columns),
    ]


def console_table(rows: pd.DataFrame, columns: dict[str, Cell]) -> Table:
    """One table for rich, numbers to the right."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in columns:
        is_name = name in ("data set", "method", "over all data sets")
        justify = "left" if is_name else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not is_name)
    for cells in texts(rows, columns):
        table.add_row(*map(escape, cells))
    return table
