"""Files that are whole or not there, and one line where the disk is full or read-only."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etpo.errors import OutputError


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` at the end of the context.

    After an error `path` is as it was before, and the other file is gone. Raises OutputError for an
    error of the operating system.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            os.replace(part, path)
    except BaseException:
        if part.is_file():
            part.unlink()
        raise


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raises OutputError with the name of `path` for an error of the operating system."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """Replaces `path`, as `written` does."""
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds `lines` to `path`: all or, with an OutputError, none."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: a buffer would write its rest again when the file is closed
        with path.open("ab", buffering=0) as file:
            end, rest = file.tell(), "".join(lines).encode("utf-8")
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
