"""Files that are written completely or not at all; errors of the disk in one line."""

import csv
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etpo.errors import OutputError


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` at the end, or is removed after an exception.

    Raises OutputError for an error of the operating system.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
    finally:
        if part.is_file():
            part.unlink()


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` atomically."""
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append all `lines` to `path`; none of them if an OutputError is raised."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        end = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError:
            os.truncate(path, end)
            raise


def read_rows(file: Path, end: int | None = None) -> list[dict[str, str]]:
    """Return the rows of a `metrics.csv`, as text without empty cells; only iterations < `end`."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]
    return [row for row in rows if end is None or int(row["iteration"]) < end]


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """Replace a `metrics.csv`; a metric missing from a row is an empty cell."""
    names = sorted(set().union(*rows) - {"iteration", "step"})
    with written(file) as part, part.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["iteration", "step", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class LogFile(logging.FileHandler):
    """A log file whose failed write raises OutputError instead of printing a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        with output_errors(Path(self.baseFilename)):
            raise
