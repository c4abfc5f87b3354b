"""A table of text cells becomes numbers: `Dataset`, and the checks that a target must pass."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from sklearn.utils import resample

from etpo.errors import ConfigError

MISSING_CELLS = frozenset({"", "?", "NA", "NaN", "nan"})
MAX_CLASSES = 20
MIN_CLASS_ROWS = 4  # two for the reward splits and one held out, whatever the draw


class Table(NamedTuple):
    """Text cells as a source gives them; `rows[i][j]` belongs to `columns[j]`."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """An encoded classification table of n rows and d features.

    features: float64 [n, d]; NaN is a missing cell. A column whose cells all parse as numbers
        keeps its values, every other one holds the index of its category in sorted order.
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


def encode(name: str, table: Table, target: str, missing: str, where: str) -> Dataset:
    """Encode `table`; `where` (such as `environment.dataset=iris`) opens every error line.

    Rows without a target are left out; with `missing="drop"` so are rows with any missing cell.
    Raises ConfigError when no classification task that can be split remains.
    """
    if target not in table.columns:
        raise ConfigError(
            f"environment.target={target} is no column of {where}; "
            f"the columns are {', '.join(table.columns)}"
        )
    if len(table.columns) < 2:
        raise ConfigError(
            f"{where} has no feature column beside {target!r}: is it comma-separated?"
        )
    if not table.rows:
        raise ConfigError(f"{where} has no rows")
    target_index = table.columns.index(target)
    rows = [row for row in table.rows if row[target_index] not in MISSING_CELLS]
    if missing == "drop":
        rows = [row for row in rows if MISSING_CELLS.isdisjoint(row)]
    if not rows:
        raise ConfigError(
            f"{where} has no complete row (environment.missing={missing}); 'impute' keeps the rows"
            if missing == "drop"
            else f"{where} has no value in its target column {target!r}"
        )
    cells = list(zip(*rows, strict=True))
    classes, class_names = _encode_target(cells.pop(target_index), f"{where}, target {target!r}")
    feature_names = tuple(column for column in table.columns if column != target)
    features, categorical = _encode_features(cells, feature_names, where)
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


def _numbers(cells: tuple[str, ...]) -> np.ndarray | None:
    """float64 [n] if every cell that is not missing is a number, else None."""
    try:
        return np.array([np.nan if c in MISSING_CELLS else float(c) for c in cells])
    except ValueError:
        return None


def _encode_features(
    columns: list[tuple[str, ...]], names: tuple[str, ...], where: str
) -> tuple[np.ndarray, np.ndarray]:
    features = np.empty((len(columns[0]), len(columns)))
    categorical = np.zeros(len(columns), dtype=bool)
    for j, cells in enumerate(columns):
        numbers = _numbers(cells)
        if numbers is None:
            categories = sorted(set(cells) - MISSING_CELLS)
            code = {category: float(index) for index, category in enumerate(categories)}
            numbers = np.array([code.get(cell, np.nan) for cell in cells])
            categorical[j] = True
        elif np.isinf(numbers).any():
            raise ConfigError(f"{where}: column {names[j]!r} holds an infinite number")
        features[:, j] = numbers
    if np.isnan(features).all():
        raise ConfigError(f"{where}: every feature cell is missing")
    return features, categorical


def _encode_target(cells: tuple[str, ...], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    numbers = _numbers(cells)
    if numbers is not None:
        cells = tuple(f"{number:.15g}" for number in numbers)  # "1" and "1.0" are one class
    counts = Counter(cells)
    names = tuple(sorted(counts, key=str if numbers is None else float))
    if len(names) < 2:
        raise ConfigError(f"{where} is constant ({names[0]!r}); two classes or more are needed")
    if len(names) > MAX_CLASSES:
        reason = "" if numbers is None else "; it looks like a regression target"
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
