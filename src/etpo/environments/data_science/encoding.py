"""A table of text cells becomes numbers: `Dataset`, and the checks that a target must pass."""

import csv
import difflib
import hashlib
import io
import re
from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype
from sklearn.utils import resample

from etpo.environments.data_science.csv_file import Table
from etpo.environments.data_science.csv_options import CsvOptions
from etpo.errors import ConfigError, described

MAX_CLASSES = 20
MIN_CLASS_ROWS = 4  # two for the reward splits and one held out, whatever the draw
_EXACT = 2**53  # up to here float64 holds every integer
_PLAIN_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?", re.ASCII)  # no 007, no 1e5
_GROUPED = r"\d{1,3}(?P<group>[,. '’\u00a0\u202f])\d{3}((?P=group)\d{3})*([.,]\d+)?"
_WRITTEN_NUMBER = re.compile(
    rf"[+-]?[$€£¥]?\s?[+-]?({_GROUPED}|\d+([.,]\d+)?)\s?[%$€£¥]?", re.ASCII
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """An encoded classification table of n rows and d features.

    features: float64 [n, d]; NaN is a missing cell. A column that pandas reads as numbers keeps
        its values, every other one holds the index of its category in sorted order.
    target: int64 [n] in 0..len(class_names) - 1, over sorted classes.
    categorical: bool [d]; which columns were encoded.
    content_hash: sha256 (hexadecimal) over all of the above and the names.
    """

    name: str
    features: np.ndarray
    target: np.ndarray
    categorical: np.ndarray
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]
    content_hash: str

    @property
    def n_classes(self) -> int:
        return len(self.class_names)


def encode(
    name: str,
    table: Table,
    target: str,
    missing: str,
    where: str,
    options: CsvOptions | None = None,
) -> Dataset:
    """Encode `table`; `where` (such as `environment.dataset=iris`) opens every error line.

    Rows without a target are left out; with `missing="drop"` so are rows with any missing cell.
    Raises ConfigError when no classification task that can be split remains, and where pandas
    would change a value or a class without a word.
    """
    options = options or CsvOptions()
    if len(table.columns) < 2:
        only = "".join(table.columns)
        raise ConfigError(
            f"{where} has no feature column beside {only!r}: what separates its cells? "
            """"environment.read_csv.sep=' '" reads other separators than , ; tab and |"""
        )
    if target not in table.columns:
        raise ConfigError(_unknown_target(target, table.columns, where))
    if not table.rows:
        raise ConfigError(f"{where} has no rows")
    table = _with_a_target(table, target, where, options)
    cells = _read(table, target, where, options)
    if missing == "drop":
        complete = cells.notna().all(axis=1).to_numpy()
        if not complete.any():
            raise ConfigError(
                f"{where} has no complete row (environment.missing=drop); 'impute' keeps the rows"
            )
        table = Table(
            table.columns, [row for row, keep in zip(table.rows, complete, strict=True) if keep]
        )
        cells = cells.loc[complete]
    texts = [row[table.columns.index(target)] for row in table.rows]
    classes, class_names = _encode_target(texts, f"{where}, target {target!r}")
    cells = cells.drop(columns=target)
    features, categorical = _encode_features(cells, table, where, options)
    feature_names = tuple(cells.columns)
    return Dataset(
        name=name,
        features=features,
        target=classes,
        categorical=categorical,
        feature_names=feature_names,
        class_names=class_names,
        content_hash=_content_hash(features, classes, categorical, feature_names, class_names),
    )


def sample_rows(dataset: Dataset, max_rows: int, seed: int) -> Dataset:
    """At most `max_rows` rows of `dataset`: a stratified sample in the order of the source.

    Raises ConfigError when a class is left with fewer than `MIN_CLASS_ROWS` of them.
    """
    if len(dataset.target) <= max_rows:
        return dataset
    rows = np.arange(len(dataset.target))
    kept = np.sort(
        resample(
            rows, replace=False, n_samples=max_rows, stratify=dataset.target, random_state=seed
        )
    )
    features, target = dataset.features[kept], dataset.target[kept]
    counts = np.bincount(target, minlength=dataset.n_classes)
    if counts.min() < MIN_CLASS_ROWS:
        rarest = dataset.class_names[counts.argmin()]
        raise ConfigError(
            f"environment.max_rows={max_rows} leaves class {rarest!r} of {dataset.name} with "
            f"{counts.min()} rows; {MIN_CLASS_ROWS} or more per class are needed"
        )
    return replace(
        dataset,
        features=features,
        target=target,
        content_hash=_content_hash(
            features, target, dataset.categorical, dataset.feature_names, dataset.class_names
        ),
    )


def _unknown_target(target: str, columns: tuple[str, ...], where: str) -> str:
    spelled = {column.lower(): column for column in columns}
    near = difflib.get_close_matches(target.lower().strip(), spelled, n=1)
    hint = f"did you mean {spelled[near[0]]}? " if near else ""
    return (
        f"environment.target={target} is no column of {where}; {hint}"
        f"the columns are {', '.join(columns)}"
    )


def _read(table: Table, target: str, where: str, options: CsvOptions) -> pd.DataFrame:
    """The cells with the types that `pandas.read_csv` finds; the target stays text."""
    dtype = {str(column): kind for column, kind in (options.dtype or {}).items()}
    unknown = next((column for column in dtype if column not in table.columns), None)
    if unknown is not None:
        raise ConfigError(
            f"environment.read_csv.dtype names {unknown!r}, which is no column of {where}"
        )
    cells = _read_csv(table, dtype | {target: str}, where, options)
    inferred = [name for name in cells if name != target and name not in dtype]
    texts = [name for name in inferred if infer_dtype(cells[name], skipna=True) == "string"]
    if texts:
        # text where int64 and uint64 do not hold all integers; pandas then keeps `na_values` too
        again = _read_csv(table, dict.fromkeys(table.columns, str), where, options)
        for name in texts:
            cells[name] = _integers_as_float64(again[name], options.thousands)
    return cells


def _integers_as_float64(column: "pd.Series[str]", thousands: str | None) -> "pd.Series[Any]":
    """The column as float64 where its cells are integers, else as it is."""
    digits = column.str.replace(thousands, "", regex=False) if thousands else column
    integers = digits.dropna().str.fullmatch(r"[+-]?[0-9]+")
    return digits.astype(np.float64) if integers.all() else column


def _read_csv(table: Table, dtype: dict[str, Any], where: str, options: CsvOptions) -> pd.DataFrame:
    lines = io.StringIO()
    csv.writer(lines, delimiter="\t").writerows(table.rows)
    lines.seek(0)
    try:
        return pd.read_csv(
            lines,
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


def _with_a_target(table: Table, target: str, where: str, options: CsvOptions) -> Table:
    """The rows that have a target; ConfigError where a class may be lost, as NA for Namibia."""
    position = table.columns.index(target)
    texts = Table((target,), [(row[position],) for row in table.rows])
    known = _read(texts, target, where, replace(options, dtype=None))[target].notna()
    named = {"", *map(str, options.na_values)}
    words = sorted(
        {text for (text,), keep in zip(texts.rows, known, strict=True) if not keep} - named
    )
    where += f", target {target!r}"
    if words:
        listed = ",".join(f"'{word}'" for word in [*options.na_values, *words])
        raise ConfigError(
            f"{where} holds {words[0]!r}, a missing cell for pandas: "
            f'"environment.read_csv.na_values=[{listed}]" leaves its rows out, '
            "environment.read_csv.keep_default_na=false with "
            """"environment.read_csv.na_values=['','?']" makes it a class"""
        )
    if not known.any():
        raise ConfigError(f"{where} has no value")
    return Table(table.columns, [row for row, keep in zip(table.rows, known, strict=True) if keep])


def _encode_features(
    cells: pd.DataFrame, table: Table, where: str, options: CsvOptions
) -> tuple[np.ndarray, np.ndarray]:
    features = np.empty(cells.shape)
    categorical = np.zeros(cells.shape[1], dtype=bool)
    for j, (name, column) in enumerate(cells.items()):
        kind = infer_dtype(column, skipna=True)
        if kind in ("integer", "floating", "mixed-integer-float", "empty"):
            features[:, j] = column.to_numpy(dtype=np.float64, na_value=np.nan)
            if np.isinf(features[:, j]).any():
                raise ConfigError(f"{where}: column {name!r} holds an infinite number")
            if (np.abs(features[:, j]) >= _EXACT).any():
                _check_exact([row[table.columns.index(name)] for row in table.rows], where, name)
            continue
        categorical[j] = True
        categories = sorted(column.dropna().unique())
        if kind != "boolean" and name not in (options.dtype or {}):
            _check_categories(categories, f"{where}: column {name!r}", str(name))
        codes = pd.Categorical(column.astype(object), categories=categories).codes
        features[:, j] = np.where(codes < 0, np.nan, codes)
    if np.isnan(features).all():
        raise ConfigError(f"{where}: every feature cell is missing")
    return features, categorical


def _check_exact(cells: list[str], where: str, name: str) -> None:
    """Raises ConfigError where two integers of a column would be one number."""
    integers = {int(cell) for cell in cells if re.fullmatch(r"[+-]?[0-9]+", cell)}
    if len(set(map(float, integers))) < len(integers):
        raise ConfigError(
            f"{where}: column {name!r} holds integers beyond 2**53 that are one number in float64; "
            f"'environment.read_csv.index_col=[{name}]' leaves the column out, "
            f"'environment.read_csv.dtype={{{name}: str}}' keeps its cells as categories"
        )


def _check_categories(categories: list[str], where: str, name: str) -> None:
    """Raises ConfigError where categories are numbers that pandas does not read as such."""
    as_text = f"'environment.read_csv.dtype={{{name}: str}}' keeps its cells as categories"
    if all(_WRITTEN_NUMBER.fullmatch(category) for category in categories):
        example = next(c for c in categories if not c.isdecimal())
        raise ConfigError(
            f"{where} holds numbers with separators or signs, such as {example!r}: "
            """write plain numbers, or give "environment.read_csv.decimal=','" or """
            f""""environment.read_csv.thousands=','"; {as_text}"""
        )
    numbers = pd.to_numeric(pd.Series(categories), errors="coerce").notna()
    words = [word for word, number in zip(categories, numbers, strict=True) if not number]
    if len(words) == 1 and len(categories) > 2 and not re.search(r"^[^#]*\d", words[0]):
        raise ConfigError(
            f"{where} holds numbers and {words[0]!r}: "
            f""""environment.read_csv.na_values=['?','{words[0]}']" makes it a missing cell, """
            f"{as_text}"
        )


def _encode_target(cells: list[str], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    numeric = all(map(_PLAIN_NUMBER.fullmatch, cells))
    if numeric:
        spelled = {cell: _shortest(cell) for cell in set(cells)}
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


def _shortest(number: str) -> str:
    """Plain decimal notation without what does not count: "1" and "1.0" are one class."""
    number = number.removeprefix("+")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number == "-0" else number


def _content_hash(
    features: np.ndarray,
    target: np.ndarray,
    categorical: np.ndarray,
    feature_names: tuple[str, ...],
    class_names: tuple[str, ...],
) -> str:
    digest = hashlib.sha256(repr((features.shape, feature_names, class_names)).encode())
    for array, dtype in ((features, "<f8"), (target, "<i8"), (categorical, "u1")):
        digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return digest.hexdigest()
