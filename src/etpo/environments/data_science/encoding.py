"""Turn a table of text cells into numbers: `Dataset`, and checks of the target."""

import difflib
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype
from sklearn.utils import resample

from etpo.environments.data_science.csv_file import CsvOptions
from etpo.errors import ConfigError, described

MAX_CLASSES = 20
MIN_CLASS_ROWS = 4  # two for the reward splits and one held out, for every draw
_EXACT = 2**53  # float64 holds every integer up to here
_INTEGER = r"[+-]?[0-9]+"
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
    where: str,
    options: CsvOptions | None = None,
) -> Dataset:
    """Encode the text cells of `table`.

    Rows without a target are dropped; with `missing="drop"` also rows with any missing cell.
    Raises ConfigError, starting with `where` (such as `environment.dataset=iris`), if no
    classification task that can be split remains, or if pandas would silently change a value or a
    class.
    """
    options = options or CsvOptions()
    _check_columns(table, target, where)
    texts = _read_csv(table, str, where, options)  # NaN is a missing cell
    _check_missing_targets(table[target], texts[target], f"{where}, target {target!r}", options)
    has_target = texts[target].notna().to_numpy()
    table, texts = table[has_target], texts[has_target]
    cells = _read_features(table.drop(columns=target), texts, where, options)
    if missing == "drop":
        complete = cells.notna().all(axis=1).to_numpy()
        if not complete.any():
            raise ConfigError(
                f"{where} has no complete row (environment.missing=drop); 'impute' keeps the rows"
            )
        table, cells = table[complete], cells[complete]
    classes, class_names = _encode_target(list(table[target]), f"{where}, target {target!r}")
    features, categorical = _encode_features(cells, table, where, options)
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


def _check_columns(table: pd.DataFrame, target: str, where: str) -> None:
    columns = list(table.columns)
    if len(columns) < 2:
        raise ConfigError(
            f"{where} has no feature column besides {''.join(columns)!r}: if its cells have "
            """another separator than , ; tab and |, set "environment.read_csv.sep=' '\""""
        )
    if target not in columns:
        spelled = {column.lower(): column for column in columns}
        near = difflib.get_close_matches(target.lower().strip(), spelled, n=1)
        hint = f"did you mean {spelled[near[0]]}? " if near else ""
        raise ConfigError(
            f"environment.target={target} is no column of {where}; {hint}"
            f"the columns are {', '.join(columns)}"
        )
    if not len(table):
        raise ConfigError(f"{where} has no rows")


def _check_missing_targets(
    cells: "pd.Series[str]", texts: "pd.Series[str]", where: str, options: CsvOptions
) -> None:
    """Raise ConfigError if a class may be lost, such as NA for Namibia, or no target is left."""
    expected = {"", *map(str, options.na_values)}
    words = sorted(set(cells[texts.isna().to_numpy()]) - expected)
    if words:
        listed = ",".join(f"'{word}'" for word in [*options.na_values, *words])
        raise ConfigError(
            f"{where} holds {words[0]!r}, a missing cell for pandas: "
            f'"environment.read_csv.na_values=[{listed}]" drops its rows, '
            "environment.read_csv.keep_default_na=false with "
            """"environment.read_csv.na_values=['','?']" makes it a class"""
        )
    if texts.isna().all():
        raise ConfigError(f"{where} has no value")


def _read_features(
    table: pd.DataFrame, texts: pd.DataFrame, where: str, options: CsvOptions
) -> pd.DataFrame:
    """Return the cells with the types that `pandas.read_csv` infers or `options.dtype` sets."""
    dtype = {str(column): kind for column, kind in (options.dtype or {}).items()}
    for column in dtype:
        if column not in texts:
            raise ConfigError(
                f"environment.read_csv.dtype names {column!r}, which is no column of {where}"
            )
    cells = _read_csv(table, {k: v for k, v in dtype.items() if k in table}, where, options)
    for name in cells:
        if name not in dtype and infer_dtype(cells[name], skipna=True) == "string":
            # integers that neither int64 nor uint64 holds; pandas then keeps `na_values` too
            column = texts[name]
            if options.thousands:
                column = column.str.replace(options.thousands, "", regex=False)
            integers = column.dropna().str.fullmatch(_INTEGER).all()
            cells[name] = (column.astype(np.float64) if integers else texts[name]).to_numpy()
    return cells


def _read_csv(table: pd.DataFrame, dtype: Any, where: str, options: CsvOptions) -> pd.DataFrame:
    lines = table.to_csv(sep="\t", header=False, index=False, lineterminator="\r\n")
    try:
        return pd.read_csv(
            io.StringIO(lines, newline=""),
            sep="\t",
            header=None,
            names=list(table.columns),
            index_col=False,
            skip_blank_lines=False,
            low_memory=False,
            dtype=dtype,
            na_values=list(options.na_values),
            keep_default_na=options.keep_default_na,
            decimal=options.decimal,
            thousands=options.thousands,
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{where} does not fit environment.read_csv: {described(error)}"
        ) from error


def _encode_features(
    cells: pd.DataFrame, table: pd.DataFrame, where: str, options: CsvOptions
) -> tuple[np.ndarray, np.ndarray]:
    features = np.empty(cells.shape)
    categorical = np.zeros(cells.shape[1], dtype=bool)
    for j, (name, column) in enumerate(cells.items()):
        source = f"{where}: column {name!r}"
        kind = infer_dtype(column, skipna=True)
        if kind in ("integer", "floating", "mixed-integer-float", "empty"):
            features[:, j] = column.to_numpy(dtype=np.float64, na_value=np.nan)
            if np.isinf(features[:, j]).any():
                raise ConfigError(f"{source} holds an infinite number")
            if (np.abs(features[:, j]) >= _EXACT).any():
                _check_exact(table[name], source, str(name))
            continue
        categorical[j] = True
        categories = sorted(column.dropna().unique())
        if kind != "boolean" and name not in (options.dtype or {}):
            _check_categories(categories, source, str(name))
        codes = pd.Categorical(column.astype(object), categories=categories).codes
        features[:, j] = np.where(codes < 0, np.nan, codes)
    if np.isnan(features).all():
        raise ConfigError(f"{where}: every feature cell is missing")
    return features, categorical


def _check_exact(cells: Sequence[str], source: str, name: str) -> None:
    """Raise ConfigError if two integers of a column are the same number in float64."""
    integers = {int(cell) for cell in cells if re.fullmatch(_INTEGER, cell)}
    if len(set(map(float, integers))) < len(integers):
        raise ConfigError(
            f"{source} holds integers beyond 2**53 that are one number in float64; "
            f"'environment.read_csv.index_col=[{name}]' drops the column, "
            f"'environment.read_csv.dtype={{{name}: str}}' keeps its cells as categories"
        )


def _check_categories(categories: list[str], source: str, name: str) -> None:
    """Raise ConfigError if the categories are numbers that pandas does not read as numbers."""
    as_text = f"'environment.read_csv.dtype={{{name}: str}}' keeps its cells as categories"
    if all(_WRITTEN_NUMBER.fullmatch(category) for category in categories):
        example = next(c for c in categories if not c.isdecimal())
        raise ConfigError(
            f"{source} holds numbers with separators or signs, such as {example!r}: "
            """write plain numbers, or set "environment.read_csv.decimal=','" or """
            f""""environment.read_csv.thousands=','"; {as_text}"""
        )
    numbers = pd.to_numeric(pd.Series(categories), errors="coerce").notna()
    words = [word for word, number in zip(categories, numbers, strict=True) if not number]
    if len(words) == 1 and len(categories) > 2 and not re.search(r"^[^#]*\d", words[0]):
        raise ConfigError(
            f"{source} holds numbers and {words[0]!r}: "
            f""""environment.read_csv.na_values=['?','{words[0]}']" makes it a missing cell, """
            f"{as_text}"
        )


def _encode_target(cells: list[str], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    numeric = all(map(_PLAIN_NUMBER.fullmatch, cells))
    if numeric:
        spelled = {cell: _normalize(cell) for cell in set(cells)}
        cells = [spelled[cell] for cell in cells]
    counts = Counter(cells)
    names = tuple(sorted(counts, key=Decimal if numeric else str))
    if len(names) < 2:
        raise ConfigError(f"{where} is constant ({names[0]!r}); two classes or more are needed")
    if len(names) > MAX_CLASSES:
        reason = "; it looks like a regression target" if numeric else ""
        raise ConfigError(
            f"{where} has {len(names)} distinct values{reason}; at most {MAX_CLASSES} classes "
            "are allowed"
        )
    rarest = min(names, key=lambda name: counts[name])
    if counts[rarest] < MIN_CLASS_ROWS:
        raise ConfigError(
            f"{where}: class {rarest!r} has {counts[rarest]} of {len(cells)} rows and cannot be "
            f"split; {MIN_CLASS_ROWS} rows or more per class are needed"
        )
    code = {name: index for index, name in enumerate(names)}
    return np.array([code[cell] for cell in cells], dtype=np.int64), names


def _normalize(number: str) -> str:
    """Return plain decimal notation, so that "1", "+1" and "1.0" are one class."""
    number = number.removeprefix("+")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number == "-0" else number
