"""Read a CSV file of any common compression, encoding and dialect as a table of text cells.

`encoding` converts the cells to numbers and categories like `pandas.read_csv`.
"""

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from etpo.errors import ConfigError, described

_SNIFFED_ROWS = 100
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BOMS = {  # UTF-32 first: its little-endian mark starts with the mark of UTF-16
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
_UNREADABLE = (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
_OTHER_FORMATS = {  # regular expressions of file contents; a column may be called PAR1
    "Parquet": rb"(?s)PAR1.*PAR1\Z",
    "Feather": rb"ARROW1\0",
    "Excel": rb"\xd0\xcf\x11\xe0",
    "SQLite": rb"SQLite format 3\0",
    "HDF5": rb"\x89HDF",
    "PDF": rb"%PDF-",
    "Zstandard": rb"\x28\xb5\x2f\xfd",
    "7-Zip": rb"7z\xbc\xaf",
    "HTML": rb"(?i)\s*<(!doctype|html)",
    "XML": rb"(?i)\s*<\?xml",
    "JSON": rb'\s*(\{"|\[\{)',
    "ARFF": rb"(?i)\s*@relation",
}
_ADVICE = (
    "; environment.read_csv.header=null reads a file without a header row, "
    "header=0 accepts the first row as it is"
)


@dataclass(frozen=True)
class CsvOptions:
    """Options of `pandas.read_csv` (`environment.read_csv`), with the same names and meanings."""

    sep: str | None = None  # None: whichever of comma, semicolon, tab and | fits
    encoding: str | None = None  # None: UTF-8, or the encoding of the byte order mark
    header: int | str | None = "infer"  # "infer": the first row, refused if it looks like data
    index_col: Any = None  # names or positions of columns to drop
    decimal: str = "."
    thousands: str | None = None
    na_values: Sequence[Any] = ("?",)  # as OpenML writes missing cells
    keep_default_na: bool = True
    dtype: Mapping[str, Any] | None = None  # {column: str} keeps numbers as categories

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "CsvOptions":
        names = [field.name for field in fields(cls)]
        for name in set(options or {}) - set(names):
            key = f"environment.read_csv.{name}"
            raise ConfigError(f"{key} is unknown; allowed: {', '.join(names)}")
        return cls(**(options or {}))

    @property
    def text_columns(self) -> list[str]:
        return [str(name) for name in self.dtype or {}]

    def __post_init__(self) -> None:
        if self.sep == "\\t":  # as a command line passes it
            object.__setattr__(self, "sep", "\t")
        words, kinds = self.na_values, self.dtype
        is_list = isinstance(words, Sequence) and not isinstance(words, str)
        is_list = is_list and all(isinstance(word, str | int | float) for word in words)
        is_mapping = isinstance(kinds, Mapping) and all(kind == "str" for kind in kinds.values())
        checks = (
            ("sep", self.sep is None or is_character(self.sep), "one character"),
            ("decimal", is_character(self.decimal), "one character"),
            ("thousands", self.thousands is None or is_character(self.thousands), "one character"),
            ("thousands", self.thousands != self.decimal, "another character than for decimal"),
            ("header", self.header in ("infer", 0, None), "infer, 0 or null"),
            ("na_values", is_list, "a list of texts and numbers"),
            ("keep_default_na", isinstance(self.keep_default_na, bool), "true or false"),
            ("dtype", self.dtype is None or is_mapping, "a mapping, {column: str}"),
        )
        for key, valid, allowed in checks:
            if not valid:
                value = getattr(self, key)
                raise ConfigError(f"environment.read_csv.{key}={value}: allowed is {allowed}")


def is_character(value: object) -> bool:
    return isinstance(value, str) and len(value) == 1


def read_table(file: Path, options: CsvOptions) -> pd.DataFrame:
    """Return the stripped text cells of a CSV file without empty lines.

    Columns without a name are called `Unnamed: 0`, ... as in pandas, or dropped if all cells are
    empty. Raises ConfigError unless the file is a CSV file with a header row and rows of equal
    length.
    """
    text = _decode(_read_bytes(file), options.encoding)
    excel = re.match(r"sep=(.)\r?\n", text)  # a line that Excel writes above the header
    if excel:
        text = text[excel.end() :]
    sep = options.sep or (excel[1] if excel else _separator(text))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=True)
    rows = {}  # by line number
    try:
        for row in lines:
            cells = list(map(str.strip, row))
            if any(cells) or len(cells) > 1:
                rows[lines.line_num] = cells
    except csv.Error as error:
        line = f"line {lines.line_num}, {error}"
        raise ConfigError(f"cannot be read as CSV: {line}") from None
    if not rows:
        raise ConfigError("the file is empty; a header row and data rows are needed")
    header = next(iter(rows.values()))
    if options.header is None:
        header = [str(position) for position in range(len(header))]
    else:
        del rows[next(iter(rows))]
    if rows and all(len(row) == len(header) + 1 and not row[-1] for row in rows.values()):
        header.append("")  # each row ends with a separator, but the header does not
    for line, row in rows.items():
        if len(row) != len(header):
            raise ConfigError(
                f"line {line} has {len(row)} cells, not {len(header)} (separated by "
                f"{sep!r}; environment.read_csv.sep sets another separator)"
            )
    table = pd.DataFrame(list(rows.values()), columns=header, dtype=object)
    if options.header == "infer":
        _check_header(table)
    return _name_columns(table, options)


def _read_bytes(file: Path) -> bytes:
    """Return the content, decompressed according to its first bytes."""
    decompress = {
        b"\x1f\x8b": gzip.decompress,
        b"BZh": bz2.decompress,
        b"\xfd7zXZ": lzma.decompress,
        b"PK\x03\x04": _unzip,
    }
    try:
        content = file.read_bytes()
        for magic, function in decompress.items():
            if content.startswith(magic):
                return function(content)
    except FileNotFoundError:
        raise ConfigError("no such file") from None
    except _UNREADABLE as error:
        raise ConfigError(f"cannot be read: {described(error)}") from None
    for kind, pattern in _OTHER_FORMATS.items():
        if re.match(pattern, content):
            raise ConfigError(f"cannot be read: it is {kind}; allowed is a CSV file")
    return content


def _unzip(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and "__MACOSX" not in n]
        if {"[Content_Types].xml", "mimetype"} & set(names):
            raise ConfigError("cannot be read: it is a spreadsheet; allowed is a CSV file")
        if len(names) != 1:
            raise ConfigError(f"the archive holds {len(names)} files; allowed is one")
        return archive.read(names[0])


def _decode(content: bytes, encoding: str | None) -> str:
    found = next((name for mark, name in _BOMS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding or found).removeprefix("\ufeff")
    except LookupError:
        raise ConfigError(
            f"environment.read_csv.encoding={encoding} is unknown; allowed is an encoding of "
            "Python, such as utf-8, cp1252, latin-1"
        ) from None
    except UnicodeDecodeError as error:
        likely = "utf-16-le" if b"\0" in content else "cp1252"
        raise ConfigError(
            f"cannot be read as {encoding or found}: {error.reason} at byte {error.start}; "
            f"environment.read_csv.encoding={likely} or another name selects the encoding"
        ) from None
    if "\0" in text:
        raise ConfigError(
            "cannot be read: it holds NUL characters; a UTF-16 file without a mark needs "
            "environment.read_csv.encoding=utf-16-le"
        )
    return text


def _separator(text: str) -> str:
    """Return the separator that splits the first rows into the same number of cells, at least two.

    If there is none, return the separator with the most cells in the header. Raise ConfigError if
    there are several.
    """
    widths = {}
    for sep in (",", ";", "\t", "|"):
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=sep)
        with contextlib.suppress(csv.Error):  # a cell of more than 128 KiB
            widths[sep] = [len(row) for row in islice(filter(None, rows), _SNIFFED_ROWS)]
    fitting = [sep for sep, w in widths.items() if len(set(w)) == 1 and w[0] > 1]
    if len(fitting) > 1:
        raise ConfigError(
            f"{' and '.join(map(repr, fitting))} both split its rows into equally many "
            f"""cells; select one: "environment.read_csv.sep='{fitting[0]}'\""""
        )
    return fitting[0] if fitting else max(widths, key=lambda sep: widths[sep][:1], default=",")


def _check_header(table: pd.DataFrame) -> None:
    """Raise ConfigError if the first row looks like data."""
    columns = list(table.columns)
    numbers = [name for name in columns if _NUMBER.fullmatch(name)]
    first = int(numbers[0]) if numbers and numbers[0].isdecimal() else 0
    counting = [str(first + i) for i in range(len(numbers))]  # as in a header of positions
    if numbers and (len(numbers) < 2 or numbers != counting):
        raise ConfigError(f"the header row holds the number {numbers[0]}{_ADVICE}")
    same = table.to_numpy() == columns
    repeats = same.all(axis=1)
    if repeats.any():
        row = repeats.argmax() + 1
        raise ConfigError(f"data row {row} repeats the header row{_ADVICE}")
    repeated = [name for name, found in zip(columns, same.any(axis=0), strict=True) if found]
    if len([name for name in repeated if name and name not in numbers]) * 2 > len(columns):
        raise ConfigError(
            f"cells such as {repeated[0]!r} are in the header row and below it{_ADVICE}"
        )


def _name_columns(table: pd.DataFrame, options: CsvOptions) -> pd.DataFrame:
    """Give every column a unique name; drop empty columns and `index_col`."""
    used = (table != "").any().to_numpy() | (table.columns != "")
    names = [name or f"Unnamed: {j}" for j, name in enumerate(table.columns)]
    table = table.set_axis(names, axis="columns").loc[:, used]
    columns = list(table.columns)
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise ConfigError(
            f"two columns of the header have the same name, {twice[0]!r}; "
            "environment.read_csv.header=null reads a file without a header row"
        )
    dropped = _index_columns(options.index_col, columns)
    for position, name in enumerate(columns):
        if name not in dropped and re.fullmatch(r"Unnamed: \d+", name):
            cells = table[name]
            if len(cells) > 1 and cells.is_unique and cells.map(str.isdecimal).all():
                raise ConfigError(
                    f"column {name!r} numbers the rows, as DataFrame.to_csv writes its index; "
                    f"environment.read_csv.index_col={position} drops it"
                )
    return table.drop(columns=dropped)


def _index_columns(index_col: Any, columns: Sequence[str]) -> list[str]:
    """Return the names of the columns that `index_col` selects; ConfigError for unknown ones."""
    several = isinstance(index_col, Sequence) and not isinstance(index_col, str)
    unset = index_col is None or index_col is False
    selected = []
    for key in index_col if several else [] if unset else [index_col]:
        is_position = type(key) is int and 0 <= key < len(columns)
        selected.append(columns[key] if is_position else str(key))
        if selected[-1] not in columns:
            raise ConfigError(
                f"environment.read_csv.index_col={key} is no column; "
                f"the columns are {', '.join(columns)}"
            )
    return selected
