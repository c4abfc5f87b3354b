"""Encode a table of text cells as a `Dataset` of numbers."""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils import resample

from etpo.errors import ConfigError
from etpo_tasks.data_science.csv_file import CsvOptions

MAX_CLASSES = 20
MIN_CLASS_ROWS = 4  # at least two reward rows and one held-out row in every draw
_EXACT = 2**53  # float64 holds every integer up to here
_MISSING = {  # the missing cells of pandas.read_csv
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
_PLAIN_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?", re.ASCII)  # no 007, no 1e5
_GROUPED = r"\d{1,3}(?P<group>[,. '’\u00a0\u202f])\d{3}((?P=group)\d{3})*([.,]\d+)?"
_WRITTEN_NUMBER = re.compile(
    rf"[+-]?[$€£¥]?\s?[+-]?({_GROUPED}|\d+([.,]\d+)?)\s?[%$€£¥]?", re.ASCII
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """An encoded classification table of n rows and d features.

    Attributes:
        features: float64 [n, d]; NaN is a missing cell. A column that pandas reads as numbers keeps
            its values; every other column holds the index of its category in sorted order.
        target: int64 [n] in 0..len(class_names) - 1, over sorted classes.
        categorical: bool [d], True for encoded columns.
    """

    name: str
    features: np.ndarray
    target: np.ndarray
    categorical: np.ndarray
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def content_hash(self) -> str:
        """Return the hexadecimal sha256 of the arrays and the names of features and classes."""
        names = (self.features.shape, self.feature_names, self.class_names)
        digest = hashlib.sha256(repr(names).encode())
        arrays = ((self.features, "<f8"), (self.target, "<i8"), (self.categorical, "u1"))
        for array, dtype in arrays:
            digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return digest.hexdigest()


def encode(
    name: str,
    table: pd.DataFrame,
    target: str,
    missing: str,
    options: CsvOptions | None = None,
) -> Dataset:
    """Encode the text cells of `table`.

    Rows without a target are dropped; with `missing="drop"` also rows with a missing cell. Raises
    ConfigError if the remaining rows are not a classification task that can be split, or if pandas
    would silently change a value or a class.
    """
    options = options or CsvOptions()
    _check_columns(table, target, options)
    words = {*map(str, options.na_values)} | (_MISSING if options.keep_default_na else set())
    _check_missing_targets(table[target], words, options)
    texts = table.mask(table.isin(words))[~table[target].isin(words)]  # NaN is a missing cell
    cells = pd.DataFrame({name: _parse(texts[name], options) for name in texts if name != target})
    if missing == "drop":
        complete = cells.notna().all(axis=1)
        if not complete.any():
            raise ConfigError(
                "no complete row is left (environment.missing=drop); 'impute' keeps the rows"
            )
        texts, cells = texts[complete], cells[complete]
    classes, class_names = _encode_target(texts[target])
    features, categorical = _encode_features(cells, texts, options)
    return Dataset(name, features, classes, categorical, tuple(cells.columns), class_names)


def sample_rows(dataset: Dataset, max_rows: int, seed: int) -> Dataset:
    """Return a stratified sample of at most `max_rows` rows in the order of the source.

    Raises ConfigError if a class is left with fewer than `MIN_CLASS_ROWS` rows.
    """
    if len(dataset.target) <= max_rows:
        return dataset
    rows, classes = np.arange(len(dataset.target)), dataset.target
    kept = np.sort(
        resample(rows, replace=False, n_samples=max_rows, stratify=classes, random_state=seed)
    )
    counts = np.bincount(classes[kept], minlength=dataset.n_classes)
    if counts.min() < MIN_CLASS_ROWS:
        rarest = dataset.class_names[counts.argmin()]
        raise ConfigError(
            f"environment.max_rows={max_rows} leaves class {rarest!r} of {dataset.name} with "
            f"{counts.min()} rows; {MIN_CLASS_ROWS} or more per class are needed"
        )
    return replace(dataset, features=dataset.features[kept], target=classes[kept])


def _check_columns(table: pd.DataFrame, target: str, options: CsvOptions) -> None:
    columns = list(table.columns)
    for name in options.text_columns:
        if name not in columns:
            raise ConfigError(f"environment.read_csv.dtype names {name!r}, which is no column")
    if len(columns) < 2:
        raise ConfigError(
            f"no feature column besides {''.join(columns)!r}: if its cells have "
            """another separator than , ; tab and |, set "environment.read_csv.sep=' '\""""
        )
    if target not in columns:
        spelled = {column.lower(): column for column in columns}
        near = difflib.get_close_matches(target.lower().strip(), spelled, n=1)
        hint = f"did you mean {spelled[near[0]]}? " if near else ""
        raise ConfigError(
            f"environment.target={target} is no column; {hint}the columns are {', '.join(columns)}"
        )
    if not len(table):
        raise ConfigError("no data rows")


def _check_missing_targets(
    column: "pd.Series[str]", missing: set[str], options: CsvOptions
) -> None:
    """Raise ConfigError if a class counts as missing (NA for Namibia) or no target is left."""
    cells, source = set(column), f"target {column.name!r}"
    words = sorted(cells & missing - {"", *map(str, options.na_values)})
    if words:
        listed = ",".join(f"'{word}'" for word in [*options.na_values, *words])
        raise ConfigError(
            f"{source} holds {words[0]!r}, a missing cell for pandas: "
            f'"environment.read_csv.na_values=[{listed}]" drops its rows, '
            "environment.read_csv.keep_default_na=false with "
            """"environment.read_csv.na_values=['','?']" makes it a class"""
        )
    if cells <= missing:
        raise ConfigError(f"{source} has no value")


def _parse(texts: "pd.Series[str]", options: CsvOptions) -> "pd.Series[Any]":
    """Parse a column like `pandas.read_csv`: float64, lower-case booleans, or text."""
    if texts.name in options.text_columns:
        return texts
    known = texts.dropna().astype(object)
    if known.isin(("True", "TRUE", "true", "False", "FALSE", "false")).all() and len(known):
        return texts.str.lower()
    numbers = pd.to_numeric(known.map(partial(_with_point, options=options)), errors="coerce")
    if numbers.isna().any():
        return texts
    missing = pd.to_numeric(pd.Series(list(options.na_values), dtype=object), errors="coerce")
    numbers = numbers.astype(np.float64)
    return numbers.where(~numbers.isin(missing.dropna())).reindex(texts.index)


def _with_point(number: str, options: CsvOptions) -> str:
    """Remove thousands separators and make the decimal separator a point."""
    whole, separator, fraction = number.partition(options.decimal)
    whole = whole.replace(options.thousands or "", "").replace(".", "x")
    return whole + separator.replace(options.decimal, ".") + fraction


def _encode_features(
    cells: pd.DataFrame, texts: pd.DataFrame, options: CsvOptions
) -> tuple[np.ndarray, np.ndarray]:
    features = np.empty(cells.shape)
    categorical = np.zeros(cells.shape[1], dtype=bool)
    for j, (name, column) in enumerate(cells.items()):
        if column.dtype == np.float64:
            features[:, j] = column
            if np.isinf(features[:, j]).any():
                raise ConfigError(f"column {name!r} holds an infinite number")
            if (np.abs(features[:, j]) >= _EXACT).any():
                _check_exact(texts[name].dropna(), str(name))
            continue
        categorical[j] = True
        categories = sorted(column.dropna().unique())
        if name not in options.text_columns:
            _check_categories(categories, str(name))
        codes = pd.Categorical(column.astype(object), categories=categories).codes
        features[:, j] = np.where(codes < 0, np.nan, codes)
    if np.isnan(features).all():
        raise ConfigError("every feature cell is missing")
    return features, categorical


def _check_exact(cells: Iterable[str], name: str) -> None:
    """Raise ConfigError if two integers of a column are the same number in float64."""
    integers = {int(cell) for cell in cells if re.fullmatch(r"[+-]?[0-9]+", cell)}
    if len(set(map(float, integers))) < len(integers):
        raise ConfigError(
            f"column {name!r} holds integers beyond 2**53 that are one number in float64; "
            f"'environment.read_csv.index_col=[{name}]' drops the column, "
            f"'environment.read_csv.dtype={{{name}: str}}' keeps its cells as categories"
        )


def _check_categories(categories: list[str], name: str) -> None:
    """Raise ConfigError if the categories are numbers that pandas reads as text."""
    as_text = f"'environment.read_csv.dtype={{{name}: str}}' keeps its cells as categories"
    if all(_WRITTEN_NUMBER.fullmatch(category) for category in categories):
        example = next(c for c in categories if not c.isdecimal())
        raise ConfigError(
            f"column {name!r} holds numbers with separators or signs, such as {example!r}: "
            """write plain numbers, or set "environment.read_csv.decimal=','" or """
            f""""environment.read_csv.thousands=','"; {as_text}"""
        )
    numbers = pd.to_numeric(pd.Series(categories), errors="coerce").notna()
    words = [word for word, number in zip(categories, numbers, strict=True) if not number]
    if len(words) == 1 and len(categories) > 2 and not re.search(r"^[^#]*\d", words[0]):
        raise ConfigError(
            f"column {name!r} holds numbers and {words[0]!r}: "
            f""""environment.read_csv.na_values=['?','{words[0]}']" makes it a missing cell, """
            f"{as_text}"
        )


def _encode_target(column: "pd.Series[str]") -> tuple[np.ndarray, tuple[str, ...]]:
    cells, source = list(column), f"target {column.name!r}"
    numeric = all(map(_PLAIN_NUMBER.fullmatch, cells))
    if numeric:
        spelled = {cell: _normalize(cell) for cell in set(cells)}
        cells = [spelled[cell] for cell in cells]
    counts = Counter(cells)
    names = tuple(sorted(counts, key=Decimal if numeric else str))
    if len(names) < 2:
        raise ConfigError(f"{source} is constant ({names[0]!r}); two classes or more are needed")
    if len(names) > MAX_CLASSES:
        reason = "; it looks like a regression target" if numeric else ""
        raise ConfigError(
            f"{source} has {len(names)} distinct values{reason}; at most {MAX_CLASSES} classes "
            "are allowed"
        )
    rarest = min(names, key=lambda name: counts[name])
    if counts[rarest] < MIN_CLASS_ROWS:
        raise ConfigError(
            f"{source}: class {rarest!r} has {counts[rarest]} of {len(cells)} rows and cannot be "
            f"split; {MIN_CLASS_ROWS} rows or more per class are needed"
        )
    return pd.Categorical(cells, categories=names).codes.astype(np.int64), names


def _normalize(number: str) -> str:
    """Return plain decimal notation, so that "1", "+1" and "1.0" are one class."""
    number = number.removeprefix("+")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number == "-0" else number
