"""Token credit of a run as one HTML page; docs/credit.md explains it."""

import base64
import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from etpo.files import write_text
from etpo.studies.pages import render

PAGE_ITERATIONS = 50  # limits the size of a page


def write_page(file: Path, title: str) -> None:
    """Write the page of a `credit.jsonl` next to it, or remove it if there are no lines."""
    lines, page = file.read_text(encoding="utf-8").splitlines(), file.with_suffix(".html")
    if lines:
        write_text(page, to_html([json.loads(line) for line in lines], title))
    else:
        page.unlink(missing_ok=True)


def to_html(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Render the lines of a `credit.jsonl`, in their order; at least one.

    Untrusted texts reach the page as JSON and become text nodes. The content security policy of the
    page allows only its own script and no loading.
    """
    iterations = [
        {"iteration": number, "actions": list(actions)}
        for number, actions in groupby(rows, key=lambda row: row["iteration"])
    ]
    script = Path(__file__).with_name("credit.js").read_text(encoding="utf-8")
    return render(
        "credit.html.j2",
        title=title,
        no_advantages=not any(x for row in rows for x in row.get("advantage") or ()),
        iterations=evenly_spaced(iterations, PAGE_ITERATIONS),
        omitted=max(0, len(iterations) - PAGE_ITERATIONS),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """Select at most `count` >= 2 evenly spaced items, including the first and the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(place)] for place in places]
