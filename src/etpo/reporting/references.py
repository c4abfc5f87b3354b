"""ROC AUCs of other models, from a CSV file, to be shown beside the methods."""

from pathlib import Path

import pandas as pd

from etpo.errors import ConfigError

COLUMNS = ["dataset", "model", "auc"]


def read_references(path: str | None) -> pd.DataFrame:
    """dataset, model, auc; a row per data set and model, none where `path` is None.

    The file has the data set in the column `name`, and for a model M its mean ROC AUC in M and
    the deviation in M_std; other columns are ignored. Raises ConfigError where it is not such.
    """
    if path is None:
        return pd.DataFrame(columns=COLUMNS)
    if not Path(path).is_file():
        raise ConfigError(f"references={path}: no such file; allowed is a CSV file")
    try:
        wide = pd.read_csv(path)
    except ValueError as error:
        raise ConfigError(f"references={path}: {str(error).splitlines()[0]}") from error
    models = [name for name in wide if f"{name}_std" in wide]
    if "name" not in wide or not models:
        raise ConfigError(
            f"references={path}: allowed is a table with the column name and, for every model, "
            "MODEL and MODEL_std"
        )
    for model in models:
        if not pd.api.types.is_numeric_dtype(wide[model]):
            raise ConfigError(f"references={path}: the column {model} has a cell that is no number")
    long = wide.melt("name", models, "model", "auc").rename(columns={"name": "dataset"})
    return long.dropna()[COLUMNS]
