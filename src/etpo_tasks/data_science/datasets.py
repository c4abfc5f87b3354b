"""Load a data set: generated, from scikit-learn, from a CSV file or from OpenML.

The names are the 14 data sets of the ETPO paper (arXiv 2402.06700, section 5), four data sets of
scikit-learn, and `csv` for any other file.
"""

import difflib
import os
import re
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn import datasets as bundled

from etpo.environments.validation import error_prefix
from etpo.errors import ConfigError, check_integer, described
from etpo_tasks.data_science.csv_file import CsvOptions, read_table
from etpo_tasks.data_science.encoding import Dataset, encode, sample_rows

__all__ = ["DATASET_NAMES", "Dataset", "load_dataset"]

_LINES = ("012", "345", "678", "036", "147", "258", "048", "246")  # of tic-tac-toe, by square


def tic_tac_toe() -> pd.DataFrame:
    """Return all 958 boards at the end of a game in which x moves first (OpenML 50), sorted.

    Cells are x, o or b (blank); the class is positive if x has won.
    """
    squares = product(("top", "middle", "bottom"), ("left", "middle", "right"))
    columns = [f"{row}-{column}-square" for row, column in squares]
    rows = []
    for board in product("box", repeat=9):
        x, o = (any(all(board[int(i)] == p for i in line) for line in _LINES) for p in "xo")
        ahead = board.count("x") - board.count("o")
        last_by_x = ahead == 1 and not o and (x or "b" not in board)
        last_by_o = ahead == 0 and not x and o
        if last_by_x or last_by_o:
            rows.append((*board, "positive" if x else "negative"))
    return pd.DataFrame(rows, columns=[*columns, "Class"])


def balance_scale() -> pd.DataFrame:
    """Return all pairs of weights and distances in 1..5 (OpenML 11, 625 rows).

    The class is the side with the larger product of weight and distance: L, R or B (balanced).
    """
    rows = []
    for left_weight, left_distance, right_weight, right_distance in product(range(1, 6), repeat=4):
        left, right = left_weight * left_distance, right_weight * right_distance
        side = "L" if left > right else "R" if right > left else "B"
        rows.append((left_weight, left_distance, right_weight, right_distance, side))
    columns = ["left-weight", "left-distance", "right-weight", "right-distance", "class"]
    return pd.DataFrame(rows, columns=columns)


_GENERATED = {"tic_tac_toe": tic_tac_toe, "balance_scale": balance_scale}
_BUNDLED = {
    "iris": bundled.load_iris,
    "wine": bundled.load_wine,
    "breast_cancer": bundled.load_breast_cancer,
    "digits": bundled.load_digits,
}
_OPENML = {  # ids on OpenML, as in CAAFE and ETPO
    "breast_w": 15,
    "cmc": 23,
    "credit_g": 31,
    "diabetes": 37,
    "eucalyptus": 188,
    "pc1": 1068,
    "airlines": 1169,
    "jungle_chess": 41027,
}
_KAGGLE = {  # page under kaggle.com, target column
    "kidney_stone": ("competitions/playground-series-s3e12", "target"),
    "pharyngitis": ("datasets/yoshifumimiya/pharyngitis", "radt"),
    "health_insurance": (
        "datasets/owaiskhan9654/health-insurance-lead-prediction-raw-data",
        "Response",
    ),
    "spaceship_titanic": ("competitions/spaceship-titanic", "Transported"),
}
DATASET_NAMES = (*_GENERATED, *_BUNDLED, *_OPENML, *_KAGGLE, "csv")


def load_dataset(
    name: str,
    *,
    path: str | None = None,
    target: str | None = None,
    data_dir: str | None = None,
    missing: str = "impute",
    max_rows: int = 50_000,
    seed: int = 0,
    read_csv: Mapping[str, Any] | None = None,
) -> Dataset:
    """Load and encode the data set `name`, one of `DATASET_NAMES`.

    Args:
        path, target: file and target column (None: the last one) of `name="csv"`.
        data_dir: folder with NAME.csv, preferred to OpenML; None: ETPO_DATA_DIR.
        missing: "impute" keeps missing cells as NaN, "drop" drops their rows.
        max_rows: a larger data set is reduced to a stratified sample of this size.
        seed: seed of that sample.
        read_csv: options of `pandas.read_csv` for CSV files, see `CsvOptions`.

    Raises ConfigError if the name, the file or its content cannot be used.
    """
    if missing not in ("impute", "drop"):
        raise ConfigError(f"environment.missing={missing} is unknown; allowed: impute, drop")
    check_integer("environment.max_rows", max_rows, 1)
    if name not in DATASET_NAMES:
        near = difflib.get_close_matches(str(name), DATASET_NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"environment.dataset={name} is unknown; {hint}known: {', '.join(DATASET_NAMES)}"
        )
    options = CsvOptions.of(read_csv)
    if name == "csv":
        dataset = _load_csv(path, target, missing, options)
    else:
        for key, value in (("path", path), ("target", target)):
            if value is not None:
                raise ConfigError(
                    f"environment.{key} is read with environment.dataset=csv only, "
                    f"not with environment.dataset={name}"
                )
        dataset = _load_named(name, data_dir, missing, options)
    return sample_rows(dataset, max_rows, seed)


def _load_csv(path: str | None, target: str | None, missing: str, options: CsvOptions) -> Dataset:
    if path is None:
        raise ConfigError("environment.path=FILE.csv is needed with environment.dataset=csv")
    where = f"environment.path={path}"
    if "://" in path:
        raise ConfigError(f"{where} is an address; allowed is a file: download it first")
    file = Path(path).expanduser()
    name = re.sub(r"\W+", "_", file.name.partition(".")[0])
    with error_prefix(where):
        table = read_table(file, options)
        target = table.columns[-1] if target is None else str(target)
        return encode(name, table, target, missing, options)


def _load_named(name: str, data_dir: str | None, missing: str, options: CsvOptions) -> Dataset:
    where = f"environment.dataset={name}"
    if name in _GENERATED:
        table = _GENERATED[name]()
    elif name in _BUNDLED:
        content = _BUNDLED[name]()
        table = pd.DataFrame(content.data.astype(object), columns=list(content.feature_names))
        table["class"] = content.target_names[content.target]
    elif file := _file_in(data_dir or os.environ.get("ETPO_DATA_DIR"), name):
        with error_prefix(f"{where} ({file})"):
            table = read_table(file, options)
            return encode(name, table, table.columns[-1], missing, options)
    else:
        table = _openml_table(name)
    with error_prefix(where):
        return encode(name, table.map(str), table.columns[-1], missing)


def _file_in(data_dir: str | None, name: str) -> Path | None:
    """Return `data_dir`/`name`.csv if that file exists."""
    if not data_dir:
        return None
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"environment.data_dir={data_dir} (or ETPO_DATA_DIR) is no folder")
    file = folder / f"{name}.csv"
    return file if file.is_file() else None


def _openml_table(name: str) -> pd.DataFrame:
    """Fetch a data set from OpenML; scikit-learn caches it."""
    missing_file = f"environment.dataset={name}: no {name}.csv in environment.data_dir"
    if name in _KAGGLE:
        page, target = _KAGGLE[name]
        raise ConfigError(
            f"{missing_file}; download kaggle.com/{page} and set environment.dataset=csv "
            f"environment.path=FILE environment.target={target}, or put {name}.csv (header row, "
            "target last) into environment.data_dir or ETPO_DATA_DIR"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # each failed attempt warns
            content = bundled.fetch_openml(
                data_id=_OPENML[name], as_frame=True, parser="auto", n_retries=1
            )
    except Exception as error:  # network, HTTP, parser and cache errors share no base class
        raise ConfigError(
            f"{missing_file}, and OpenML (openml.org/d/{_OPENML[name]}) failed with "
            f"{described(error)}; put {name}.csv (header row, target last) into "
            "environment.data_dir or ETPO_DATA_DIR, "
            "or set environment.dataset=csv environment.path=FILE"
        ) from None
    columns = [content.data.astype(object), content.target.astype(object)]
    return pd.concat(columns, axis="columns").fillna("")
