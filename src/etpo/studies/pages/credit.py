"""Token credit of a run as one HTML file that needs nothing else; docs/credit.md."""

import base64
import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from etpo.files import write_text

# iterations on a page at most, so that its size stays in bounds however long a run is
PAGE_ITERATIONS = 50


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a `credit.jsonl`."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_page(page: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Replaces `page` in one step; without rows there is no page."""
    if not rows:
        page.unlink(missing_ok=True)
        return
    write_text(page, to_html(rows, title))


def to_html(rows: Sequence[dict[str, Any]], title: str) -> str:
    """The page of the lines of a `credit.jsonl`, in their order; at least one.

    Texts of the rows are untrusted: they reach the page as JSON data and become text nodes, and the
    page's content security policy lets no script run but its own, and nothing be loaded.
    """
    iterations = [
        {"iteration": number, "actions": list(actions)}
        for number, actions in groupby(rows, key=lambda row: row["iteration"])
    ]
    script = Path(__file__).with_name("credit.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("etpo.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    # `tojson` would sort the keys; it escapes what could end the element
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template("credit.html.j2").render(
        title=title,
        uncoloured=not any(x for row in rows for x in row.get("advantage") or ()),
        iterations=spread(iterations, PAGE_ITERATIONS),
        left_out=max(0, len(iterations) - PAGE_ITERATIONS),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` >= 2 of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
