"""A report as one HTML file that needs nothing else: for a browser, light or dark."""

from collections.abc import Sequence

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from etpo.reporting.figures import svg
from etpo.reporting.render import blocks, scale_line, texts


def to_html(
    table: pd.DataFrame,
    scale: pd.DataFrame,
    notes: Sequence[str],
    curves: Figure,
    bars: Figure,
) -> str:
    """The tables of `to_markdown` and both figures; the same input gives the same text."""
    own = table[table["kind"] == "method"]
    methods, datasets = (", ".join(own[name].unique()) for name in ("method", "dataset"))
    shown = [
        {
            "title": name,
            "columns": list(columns),
            # value, " [" where there is an interval, the interval
            "rows": [[cell.partition(" [") for cell in row] for row in texts(rows, columns)],
            "scale": scale_line(scale, name) if name in scale.index else "",
        }
        for name, rows, columns in blocks(table)
    ]
    environment = Environment(
        loader=PackageLoader("etpo.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(
        facts=f"{own['seeds'].sum()} runs of {methods} on {datasets}.",
        blocks=shown,
        curves=inline_svg(curves),
        bars=inline_svg(bars),
        notes=notes,
    )


def inline_svg(figure: Figure) -> Markup:
    """The figure as an `<svg>` element without background; what is black takes the text's colour.

    Matplotlib leaves black text without a colour of its own, so that it inherits `fill`.
    """
    text = svg(figure, transparent=True)
    return Markup(text[text.index("<svg") :].replace("#000000", "currentColor"))
