"""Where the rows come from: code, scikit-learn, a CSV file, OpenML.

The names are the 14 data sets of the ETPO paper (arXiv 2402.06700, section 5), four sets that
come with scikit-learn, and `csv` for a file of the user's own.
"""

import difflib
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sklearn import datasets as bundled

from etpo.environments.data_science import generated
from etpo.environments.data_science.csv_file import Table, read_table
from etpo.environments.data_science.csv_options import CsvOptions
from etpo.environments.data_science.encoding import Dataset, encode, sample_rows
from etpo.errors import ConfigError, check_integer, described

__all__ = ["DATASET_NAMES", "Dataset", "load_dataset"]

_GENERATED = {"tic_tac_toe": generated.tic_tac_toe, "balance_scale": generated.balance_scale}
_BUNDLED = {
    "iris": bundled.load_iris,
    "wine": bundled.load_wine,
    "breast_cancer": bundled.load_breast_cancer,
    "digits": bundled.load_digits,
}
_OPENML = {  # the numbers of the sets there, as CAAFE and ETPO take them
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
    """Load and encode the data set called `name`, one of `DATASET_NAMES`.

    `csv` reads the file `path`; its target is the column `target`, the last one by default.
    `read_csv` holds options of `pandas.read_csv` for it and for NAME.csv: see `CsvOptions`.
    Sets that neither code nor scikit-learn has are read from `data_dir`/NAME.csv (`data_dir`
    defaults to the environment variable ETPO_DATA_DIR), then from OpenML if they are there.
    A set of more than `max_rows` rows is a stratified sample of that many, drawn by `seed` and kept
    in the order of the source; its columns are encoded as those of the whole set.

    Raises ConfigError where the name, the file or its content cannot be used.
    """
    if missing not in ("impute", "drop"):
        raise ConfigError(f"environment.missing={missing} is unknown; allowed: impute, drop")
    check_integer("environment.max_rows", max_rows, 1)
    if name not in DATASET_NAMES:
        raise ConfigError(_unknown(name))
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


def _load_named(name: str, data_dir: str | None, missing: str, options: CsvOptions) -> Dataset:
    where = f"environment.dataset={name}"
    if name in _GENERATED:
        table = _GENERATED[name]()
    elif name in _BUNDLED:
        table = _bundled_table(name)
    else:
        file = _file_in(data_dir or os.environ.get("ETPO_DATA_DIR"), name)
        if file is not None:
            where += f" ({file})"
            table = read_table(file, where, options)
            return encode(name, table, table.columns[-1], missing, where, options)
        table = _openml_table(name)
    return encode(name, table, table.columns[-1], missing, where)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(str(name), DATASET_NAMES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"environment.dataset={name} is unknown; {hint}known: {', '.join(DATASET_NAMES)}"


def _load_csv(path: str | None, target: str | None, missing: str, options: CsvOptions) -> Dataset:
    if path is None:
        raise ConfigError("environment.path=FILE.csv is needed with environment.dataset=csv")
    where = f"environment.path={path}"
    if "://" in path:
        raise ConfigError(f"{where} is an address; allowed is a file: download it first")
    file = Path(path).expanduser()
    table = read_table(file, where, options)
    name = re.sub(r"\W+", "_", file.name.partition(".")[0])
    target = table.columns[-1] if target is None else str(target)
    return encode(name, table, target, missing, where, options)


def _bundled_table(name: str) -> Table:
    content = _BUNDLED[name]()
    classes = (str(content.target_names[label]) for label in content.target)
    return _table((*content.feature_names, "class"), content.data.tolist(), classes)


def _file_in(data_dir: str | None, name: str) -> Path | None:
    """`data_dir`/`name`.csv if it is there."""
    if not data_dir:
        return None
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"environment.data_dir={data_dir} (or ETPO_DATA_DIR) is no folder")
    file = folder / f"{name}.csv"
    return file if file.is_file() else None


def _openml_table(name: str) -> Table:
    """Fetch from OpenML; scikit-learn keeps a copy in its own data folder."""
    missing_file = f"environment.dataset={name}: no {name}.csv in environment.data_dir"
    if name in _KAGGLE:
        page, target = _KAGGLE[name]
        raise ConfigError(
            f"{missing_file}; download kaggle.com/{page} and give environment.dataset=csv "
            f"environment.path=FILE environment.target={target}, or put {name}.csv (header row, "
            "target last) into environment.data_dir or ETPO_DATA_DIR"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # each try that fails warns
            content = bundled.fetch_openml(
                data_id=_OPENML[name], as_frame=True, parser="auto", n_retries=1
            )
    except Exception as error:  # network, HTTP, parser and cache errors share no base class
        raise ConfigError(
            f"{missing_file}, and OpenML (openml.org/d/{_OPENML[name]}) failed with "
            f"{described(error)}; put {name}.csv (header row, target last) into "
            "environment.data_dir or ETPO_DATA_DIR, "
            "or give environment.dataset=csv environment.path=FILE"
        ) from None
    features, target = content.data.astype(object), content.target.astype(object)
    rows = features.where(features.notna(), "").values.tolist()
    classes = target.where(target.notna(), "")
    return _table((*features.columns, target.name), rows, map(str, classes))


def _table(columns: Iterable[str], rows: Iterable[list], classes: Iterable[str]) -> Table:
    cells = [(*map(str, row), label) for row, label in zip(rows, classes, strict=True)]
    return Table(tuple(map(str, columns)), cells)
