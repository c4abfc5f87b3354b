"""A report as one HTML page, for a light or dark browser."""

from collections.abc import Sequence

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from etpo.studies.figures import to_svg
from etpo.studies.pages import render
from etpo.studies.tables import formatted, scale_line


def to_html(
    table: pd.DataFrame, scale: pd.DataFrame, notes: Sequence[str], curves: Figure, bars: Figure
) -> str:
    """Render the content of `table.md` and both figures; equal input gives equal text."""
    own = table[table["kind"] == "method"]
    methods, datasets = (", ".join(own[name].unique()) for name in ("method", "dataset"))
    return render(
        "report.html.j2",
        facts=f"{own['seeds'].sum()} runs of {methods} on {datasets}.",
        parts=formatted(table),
        scales={dataset: scale_line(scale, dataset) for dataset in scale.index},
        curves=inline_svg(curves),
        bars=inline_svg(bars),
        notes=notes,
    )


def inline_svg(figure: Figure) -> Markup:
    """Return an `<svg>` element without background that draws black in the colour of the text.

    Matplotlib writes black text without a colour, so that it inherits `fill`.
    """
    text = to_svg(figure, transparent=True)
    return Markup(text[text.index("<svg") :].replace("#000000", "currentColor"))
