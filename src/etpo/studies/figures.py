"""The figures of a report: learning curves, and bars of the final reward and the curve area."""

import io
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from etpo.studies.statistics import iqm_curve

# palette of Okabe and Ito without its yellow, which is too light for lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
REFERENCE_DASHES = ((0, (1, 3)), (0, (6, 3)), (0, (8, 3, 1, 3)), (0, (2, 6)))
GREY = "#777777"
PANEL_COLUMNS = 3
SOLID_LINES = 4  # up to this many methods are distinguished by colour alone


def learning_curves(runs: pd.DataFrame, methods: list[str], references: pd.DataFrame) -> Figure:
    """Plot mean reward against actions: IQM and 95% band of every method, a panel per data set."""
    datasets = sorted(set(runs["dataset"]))
    height = ceil(len(datasets) / PANEL_COLUMNS)
    width = ceil(len(datasets) / height)
    figure = Figure(figsize=(4.2 * width + 2.2, 3.2 * height + 0.3), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    dashes = cycle(DASHES if len(methods) > SOLID_LINES else ["-"])
    lines = {
        method: {"color": colour, "linestyle": dash, "linewidth": 1.8}
        for method, colour, dash in zip(methods, cycle(COLOURS), dashes, strict=False)
    }
    reference_lines = {
        model: {"color": GREY, "linestyle": dash, "linewidth": 1.1}
        for model, dash in zip(references["model"].unique(), cycle(REFERENCE_DASHES), strict=False)
    }
    for place, axes in enumerate(panels.flat):
        if place >= len(datasets):
            axes.set_axis_off()
            continue
        own = runs[runs["dataset"] == datasets[place]]
        for method, line in lines.items():
            draw_curve(axes, own[own["method"] == method], line)
        reference = references[references["dataset"] == datasets[place]]
        for model, auc in zip(reference["model"], reference["auc"], strict=True):
            axes.axhline(auc, **reference_lines[model])
        axes.set(title=datasets[place], xlim=(0, None))
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
        if place % width == 0:
            axes.set_ylabel("mean reward")
        if place + width >= len(datasets):
            axes.set_xlabel("actions")
    lines |= {f"{model} (reference)": line for model, line in reference_lines.items()}
    handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=3)
    return figure


def draw_curve(axes: Axes, runs: pd.DataFrame, line: dict[str, Any]) -> None:
    """Draw the IQM and band of one method over the actions that all its runs have reached."""
    curves = runs.pivot(index="env_steps", columns="seed", values="rollout/reward").dropna()
    if curves.empty:
        return
    middle, low, high = iqm_curve(curves.to_numpy())
    axes.fill_between(curves.index, low, high, color=line["color"], alpha=0.2, linewidth=0)
    axes.plot(curves.index, middle, **line)


def bars(table: pd.DataFrame, scores: pd.DataFrame, methods: list[str]) -> Figure:
    """Plot final reward and curve area of every method with 95% intervals and a dot per run.

    There is a row of panels per data set and, with several data sets, one over all of them.
    """
    parts = [
        (dataset, "final", "final reward", own, scores[scores["dataset"] == dataset])
        for dataset, own in table[table["kind"] == "method"].groupby("dataset")
    ]
    if len(parts) > 1:
        overall = table[table["kind"] == "all"]
        parts.append(("all data sets", "final_normalised", "final score", overall, scores))
    height = len(parts) * (0.35 * len(methods) + 1.0) + 0.2
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(len(parts), 2, squeeze=False, sharey=True)
    figure.get_layout_engine().set(hspace=0.04)
    for (title, final, label, estimates, runs), (left, right) in zip(parts, panels, strict=True):
        for axes, score in ((left, final), (right, "area")):
            draw_bars(axes, score, estimates.set_index("method"), runs, methods)
        left.set_title(f"{title}: {label}", loc="left", fontsize="medium")
        right.set_title(f"{title}: curve area", loc="left", fontsize="medium")
    return figure


def draw_bars(
    axes: Axes, score: str, estimates: pd.DataFrame, runs: pd.DataFrame, methods: list[str]
) -> None:
    """Draw horizontal bars of an estimated score, with its value at the right edge."""
    known = estimates.reindex(methods)[[score, f"{score}_low", f"{score}_high"]]
    for position, (method, value, low, high) in enumerate(known.itertuples(name=None)):
        if pd.isna(value):
            continue
        colour = COLOURS[position % len(COLOURS)]
        axes.barh(position, value, height=0.7, color=colour, alpha=0.55)
        axes.plot([low, high], [position] * 2, "|-", color="black", linewidth=1.5)
        own = runs.loc[runs["method"] == method, score]
        axes.plot(own, [position + 0.22] * len(own), "o", color=colour, markersize=3)
        edge = axes.get_yaxis_transform()
        axes.text(1.02, position, f"{value:.3f}", transform=edge, va="center", fontsize="small")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.4, -0.6))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.5, alpha=0.4)
    axes.set_axisbelow(True)


def save(figure: Figure, file: Path) -> None:
    """Write `file`.png and `file`.svg; equal figures give equal bytes."""
    figure.savefig(file.with_suffix(".png"), dpi=150)
    file.with_suffix(".svg").write_text(to_svg(figure), encoding="utf-8")


def to_svg(figure: Figure, transparent: bool = False) -> str:
    """Render the figure as SVG, with or without background; equal figures give equal text."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "etpo"}):
        figure.savefig(text, format="svg", transparent=transparent, metadata={"Date": None})
    return text.getvalue()


def inline_svg(figure: Figure) -> Markup:
    """Return an `<svg>` element without background, with black in the colour of the page's text.

    Matplotlib writes black text without a colour, so that it inherits `fill`.
    """
    text = to_svg(figure, transparent=True)
    return Markup(text[text.index("<svg") :].replace("#000000", "currentColor"))
