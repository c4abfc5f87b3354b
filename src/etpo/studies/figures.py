"""Figures of a report: learning curves, and bars of what they come to."""

import io
from math import ceil
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from etpo.reporting.statistics import iqm_curve

# Okabe and Ito's palette without its yellow, which is too light for lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
REFERENCE_DASHES = ((0, (1, 3)), (0, (6, 3)), (0, (8, 3, 1, 3)), (0, (2, 6)))
GREY = "#777777"
PANEL_COLUMNS = 3
PLAIN_LINES = 4  # methods that colour alone tells apart


def style(position: int, methods: int) -> dict[str, object]:
    """Colour and dashes of a method; the dashes differ where there are more than four."""
    dashes = DASHES[position % len(DASHES)] if methods > PLAIN_LINES else "-"
    return {"color": COLOURS[position % len(COLOURS)], "linestyle": dashes}


def learning_curves(runs: pd.DataFrame, methods: list[str], references: pd.DataFrame) -> Figure:
    """Mean reward against actions: IQM and 95% band of every method, one panel per data set."""
    datasets = sorted(set(runs["dataset"]))
    height = ceil(len(datasets) / PANEL_COLUMNS)
    width = ceil(len(datasets) / height)
    figure = Figure(figsize=(4.2 * width + 2.2, 3.2 * height + 0.3), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    for axes in panels.flat[len(datasets) :]:
        axes.set_axis_off()
    for axes, dataset in zip(panels.flat, datasets, strict=False):
        own = runs[runs["dataset"] == dataset]
        for position, method in enumerate(methods):
            draw_curve(axes, own[own["method"] == method], style(position, len(methods)))
        known = references[references["dataset"] == dataset].set_index("model")["auc"]
        for position, model in enumerate(dict.fromkeys(references["model"])):
            if model in known:
                axes.axhline(known[model], **reference_style(position))
        axes.set_title(dataset)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        tidy(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("mean reward")
    for axes in panels.flat[max(0, len(datasets) - width) : len(datasets)]:
        axes.set_xlabel("actions")
    add_legend(figure, methods, list(dict.fromkeys(references["model"])))
    return figure


def draw_curve(axes: Axes, runs: pd.DataFrame, line: dict[str, object]) -> None:
    """One method's IQM and band, over the actions that all its runs have reached."""
    curves = runs.pivot(index="env_steps", columns="seed", values="rollout/reward").dropna()
    if curves.empty:
        return
    middle, low, high = iqm_curve(curves.to_numpy())
    axes.fill_between(curves.index, low, high, color=line["color"], alpha=0.2, linewidth=0)
    axes.plot(curves.index, middle, linewidth=1.8, **line)


def reference_style(position: int) -> dict[str, object]:
    """Grey dashes of a reference model."""
    dashes = REFERENCE_DASHES[position % len(REFERENCE_DASHES)]
    return {"color": GREY, "linestyle": dashes, "linewidth": 1.1}


def add_legend(figure: Figure, methods: list[str], models: list[str]) -> None:
    """Names the lines to the right of the panels."""
    lines = [
        Line2D([], [], linewidth=1.8, label=method, **style(position, len(methods)))
        for position, method in enumerate(methods)
    ]
    lines += [
        Line2D([], [], label=f"{model} (reference)", **reference_style(position))
        for position, model in enumerate(models)
    ]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, handlelength=3)


def save(figure: Figure, file: Path) -> None:
    """Writes `file`.png and `file`.svg, the same bytes for the same figure."""
    figure.savefig(file.with_suffix(".png"), dpi=150)
    file.with_suffix(".svg").write_text(svg(figure), encoding="utf-8")


def svg(figure: Figure, transparent: bool = False) -> str:
    """The figure as SVG, the same text for the same figure; `transparent`: no background."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "etpo"}):
        figure.savefig(text, format="svg", transparent=transparent, metadata={"Date": None})
    return text.getvalue()


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)


def bars(table: pd.DataFrame, scores: pd.DataFrame, methods: list[str]) -> Figure:
    """Final reward and curve area of every method with 95% intervals; a dot is a run.

    One row of panels per data set; where there are several, one more over all of them.
    """
    rows = table[table["kind"] == "method"]
    blocks = [(d, own, scores[scores["dataset"] == d]) for d, own in rows.groupby("dataset")]
    if len(blocks) > 1:
        blocks.append(("all data sets", table[table["kind"] == "all"], scores))
    figure = Figure(
        figsize=(9, len(blocks) * (0.35 * len(methods) + 1.0) + 0.2), layout="constrained"
    )
    panels = figure.subplots(len(blocks), 2, squeeze=False, sharey=True)
    figure.get_layout_engine().set(hspace=0.04)
    for (title, estimates, runs), pair in zip(blocks, panels, strict=True):
        overall = title == "all data sets"
        final = ("final_normalised", "final score") if overall else ("final", "final reward")
        for axes, (name, label) in zip(pair, (final, ("area", "curve area")), strict=True):
            draw_bars(axes, name, estimates.set_index("method"), runs, methods)
            axes.set_title(f"{title}: {label}", loc="left", fontsize="medium")
    return figure


def draw_bars(
    axes: Axes, name: str, estimates: pd.DataFrame, runs: pd.DataFrame, methods: list[str]
) -> None:
    """Horizontal bars of the estimate `name`, its value at the right edge."""
    for position, method in enumerate(methods):
        if method not in estimates.index or pd.isna(estimates.loc[method, name]):
            continue
        value, low, high = estimates.loc[method, [name, f"{name}_low", f"{name}_high"]]
        colour = COLOURS[position % len(COLOURS)]
        axes.barh(position, value, height=0.7, color=colour, alpha=0.55)
        axes.plot([low, high], [position] * 2, "|-", color="black", linewidth=1.5)
        own = runs.loc[runs["method"] == method, name]
        axes.plot(own, [position + 0.22] * len(own), "o", color=colour, markersize=3)
        axes.text(
            1.02,
            position,
            f"{value:.3f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize="small",
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.5, alpha=0.4)
    axes.set_axisbelow(True)
