"""A CSV file as people have it becomes a `Table`: compression, encoding, separator, header.

Cells stay text here; what they mean is decided in `encoding`, by `pandas.read_csv`.
"""

import bz2
import csv
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from etpo.environments.data_science.csv_options import CsvOptions
from etpo.errors import ConfigError, described

_SEPARATORS = (",", ";", "\t", "|")
_SNIFFED_ROWS = 100
_BOMS = (  # UTF-32 first: its little-endian mark starts with that of UTF-16
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)
_BINARY_FORMATS = (  # with the zeros that end a name: a column may be called like it
    (b"ARROW1\0", "Feather"),
    (b"\xd0\xcf\x11\xe0", "Excel"),
    (b"SQLite format 3\0", "SQLite"),
    (b"\x89HDF", "HDF5"),
    (b"%PDF-", "PDF"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"7z\xbc\xaf", "7-Zip"),
)
_TEXT_FORMATS = (
    (b"<!doctype", "HTML"),
    (b"<html", "HTML"),
    (b"<?xml", "XML"),
    (b'{"', "JSON"),
    (b"[{", "JSON"),
    (b"@relation", "ARFF"),
)


class Table(NamedTuple):
    """Text cells as a source gives them; `rows[i][j]` belongs to `columns[j]`."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def read_table(file: Path, where: str, options: CsvOptions) -> Table:
    """Cells without surrounding blanks; lines without any cell are passed over.

    Columns without a name are called `Unnamed: 0`, ... as in pandas, and left out where they have
    no cell either. `where` opens every line of a ConfigError, which is raised where the file is no
    CSV with equally long rows and a header row.
    """
    text = _decoded(_content(file, where), where, options.encoding)
    excel = re.match(r"sep=(.)\r?\n", text)  # what Excel writes above the header
    if excel:
        text = text[excel.end() :]
    sep = options.sep or (excel[1] if excel else _separator(text, where))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=True)
    try:
        rows = [(lines.line_num, tuple(map(str.strip, row))) for row in lines]
    except csv.Error as error:
        reason = f"line {lines.line_num}, {error}"
        raise ConfigError(f"{where} cannot be read as CSV: {reason}") from None
    rows = [(line, row) for line, row in rows if any(row) or len(row) > 1]
    if not rows:
        raise ConfigError(f"{where} is empty; a header row and data rows are needed")
    header = rows[0][1] if options.header is not None else tuple(map(str, range(len(rows[0][1]))))
    if options.header is not None:
        del rows[0]
    if rows and all(len(row) == len(header) + 1 and not row[-1] for _, row in rows):
        header = (*header, "")  # each row ends with a separator, but not the header
    for line, row in rows:
        if len(row) != len(header):
            raise ConfigError(
                f"{where}: line {line} has {len(row)} cells, not {len(header)} (separated by "
                f"{sep!r}; environment.read_csv.sep sets another separator)"
            )
    table = Table(header, [row for _, row in rows])
    if options.header == "infer":
        _check_header(table, where)
    return _with_names(table, where, options)


def _content(file: Path, where: str) -> bytes:
    """The file's bytes, decompressed as they say themselves, whatever the file is called."""
    try:
        content = file.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            return gzip.decompress(content)
        if content.startswith(b"BZh"):
            return bz2.decompress(content)
        if content.startswith(b"\xfd7zXZ"):
            return lzma.decompress(content)
        if content.startswith(b"PK\x03\x04"):
            return _unzipped(content, where)
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file") from None
    except _UNREADABLE as error:
        raise ConfigError(f"{where} cannot be read: {described(error)}") from None
    kind = _other_format(content)
    if kind is not None:
        raise ConfigError(f"{where} cannot be read: it is {kind}; allowed is a CSV file")
    return content


def _other_format(content: bytes) -> str | None:
    """The name of the format of `content`; None where it may be CSV."""
    if content.startswith(b"PAR1") and content.endswith(b"PAR1"):
        return "Parquet"
    start = content.lstrip()[:16].lower()
    binary = (kind for signature, kind in _BINARY_FORMATS if content.startswith(signature))
    text = (kind for signature, kind in _TEXT_FORMATS if start.startswith(signature))
    return next(binary, None) or next(text, None)


def _unzipped(content: bytes, where: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and "__MACOSX" not in n]
        if {"[Content_Types].xml", "mimetype"} & set(names):
            raise ConfigError(f"{where} cannot be read: it is a spreadsheet; allowed is a CSV file")
        if len(names) != 1:
            raise ConfigError(f"{where}: the archive holds {len(names)} files; allowed is one")
        return archive.read(names[0])


def _decoded(content: bytes, where: str, encoding: str | None) -> str:
    found = next((name for mark, name in _BOMS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding or found).removeprefix("\ufeff")
    except LookupError:
        raise ConfigError(
            f"environment.read_csv.encoding={encoding} is unknown; allowed is an encoding that "
            "Python knows, such as utf-8, cp1252, latin-1"
        ) from None
    except UnicodeDecodeError as error:
        likely = "utf-16-le" if b"\0" in content else "cp1252"
        raise ConfigError(
            f"{where} cannot be read as {encoding or found}: {error.reason} at byte {error.start}; "
            f"environment.read_csv.encoding={likely} or the like reads other encodings"
        ) from None
    if "\0" in text:
        raise ConfigError(
            f"{where} cannot be read: it holds NUL characters; a UTF-16 file without a mark needs "
            "environment.read_csv.encoding=utf-16-le"
        )
    return text


def _separator(text: str, where: str) -> str:
    """The separator that cuts the first rows into equally many cells, two or more.

    Where none does, the one that cuts the header into most. ConfigError where several do.
    """
    widths = {}
    for sep in _SEPARATORS:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=sep)
        try:
            widths[sep] = [len(row) for row in islice(filter(None, rows), _SNIFFED_ROWS)] or [0]
        except csv.Error:  # a cell of more than 128 KiB
            widths[sep] = [0]
    fitting = [sep for sep in _SEPARATORS if widths[sep][0] > 1 and len(set(widths[sep])) == 1]
    if len(fitting) > 1:
        raise ConfigError(
            f"{where}: {' and '.join(map(repr, fitting))} both separate its rows into equally many "
            f"""cells; "environment.read_csv.sep='{fitting[0]}'" decides"""
        )
    return fitting[0] if fitting else max(_SEPARATORS, key=lambda sep: widths[sep][0])


def _check_header(table: Table, where: str) -> None:
    """Raises ConfigError where the first row looks like data."""
    advice = (
        "; environment.read_csv.header=null reads a file without a header row, "
        "header=0 takes the first row for it all the same"
    )
    numbers = [name for name in table.columns if _is_number(name)]
    counted = [str(number) for number in range(10_000)]  # a header of numbers counts up
    start = counted.index(numbers[0]) if numbers and numbers[0] in counted else -1
    if numbers and (len(numbers) < 2 or numbers != counted[start : start + len(numbers)]):
        raise ConfigError(f"{where}: the header row holds the number {numbers[0]}{advice}")
    if table.columns in table.rows:
        row = table.rows.index(table.columns) + 1
        raise ConfigError(f"{where}: data row {row} repeats the header row{advice}")
    cells = zip(*table.rows, strict=True) if table.rows else ()
    repeated = [name for name, column in zip(table.columns, cells, strict=False) if name in column]
    if len([name for name in repeated if name and name not in numbers]) * 2 > len(table.columns):
        raise ConfigError(
            f"{where}: cells such as {repeated[0]!r} are in the header row and below it{advice}"
        )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) is not None


def _with_names(table: Table, where: str, options: CsvOptions) -> Table:
    """Every column with a name of its own; without those that are no feature."""
    columns, cells = [], []
    for position, name in enumerate(table.columns):
        column = [row[position] for row in table.rows]
        if not name and not any(column):
            continue
        columns.append(name or f"Unnamed: {position}")
        cells.append(column)
    twice = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{where}: two columns of the header have the same name, {twice!r}; "
            "environment.read_csv.header=null reads a file without a header row"
        )
    left_out = _positions(options.index_col, columns)
    for position, name in enumerate(columns):
        if position not in left_out and re.fullmatch(r"Unnamed: \d+", name):
            numbered = len(set(cells[position])) == len(table.rows) > 1
            if numbered and all(cell.isdecimal() for cell in cells[position]):
                raise ConfigError(
                    f"{where}: column {name!r} numbers the rows, as DataFrame.to_csv writes its "
                    f"index; environment.read_csv.index_col={position} leaves it out"
                )
    kept = [j for j in range(len(columns)) if j not in left_out]
    rows = list(zip(*(cells[j] for j in kept), strict=True))
    return Table(tuple(columns[j] for j in kept), rows)


def _positions(index_col: Any, columns: Sequence[str]) -> set[int]:
    """The columns that `index_col` names; ConfigError where one is not there."""
    if index_col is None or index_col is False:
        return set()
    several = isinstance(index_col, Sequence) and not isinstance(index_col, str)
    found = set()
    for key in index_col if several else [index_col]:
        if type(key) is int and 0 <= key < len(columns):
            found.add(key)
        elif str(key) in columns:
            found.add(columns.index(str(key)))
        else:
            raise ConfigError(
                f"environment.read_csv.index_col={key} is no column; "
                f"the columns are {', '.join(columns)}"
            )
    return found
