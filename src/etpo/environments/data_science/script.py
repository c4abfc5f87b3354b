"""The best program as a file that runs without this package.

`best_action.py` needs `best_action_data.csv` beside it, scikit-learn, and what the program imports.
"""

import inspect
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from etpo.environments.data_science.scoring import ProgramScorer, impute, roc_auc
from etpo.files import written

DATA_FILE = "best_action_data.csv"

_TEMPLATE = '''\
# {title}
# Run: python best_action.py   ({data_file} must lie beside this file)
{program}


def _evaluate():
    """Print {measure}."""
    import csv
    import random
    from pathlib import Path

    import joblib
    import numpy as np
    from sklearn.impute import SimpleImputer
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split
    from threadpoolctl import threadpool_limits

{functions}

    with Path(__file__).with_name({data_file!r}).open(newline="", encoding="utf-8") as lines:
        table = list(csv.reader(lines))[1:]
    x = np.array([[float(cell or "nan") for cell in row[:-2]] for row in table])
    y = np.array([int(row[-2]) for row in table])
    held_out = np.array([row[-1] == "held_out" for row in table])
    categorical = np.zeros(x.shape[1], dtype=bool)
    categorical[{categorical}] = True
    rows = np.arange(len(y))
    if held_out.any():
        halves = [(rows[~held_out], rows[held_out])]
    else:
        halves = [
            train_test_split(rows, test_size=0.5, stratify=y, random_state=1000 + i)
            for i in range({n_splits})
        ]
    aucs = []
    for train, test in halves:
        x_train, x_test = impute(x[train], x[test], categorical)
        random.seed({seed})
        np.random.seed({seed})
        np.random.bit_generator.randbits = random.Random({seed}).getrandbits
        with threadpool_limits(1), joblib.parallel_config(backend="sequential"):
            model = build_model(x_train, y[train])
            found = np.asarray(model.predict_proba(x_test), dtype=float)
        classes = np.asarray(getattr(model, "classes_", range({n_classes})))
        if len(classes) == found.shape[1]:  # a class that the model never saw gets 0
            placed = np.zeros((len(test), {n_classes}))
            placed[:, classes.astype(int)] = found
            found = placed
        aucs.append(roc_auc(y[test], found))
    print(f"{measure}: {{np.mean(aucs):.6f}}")


if __name__ == "__main__":
    _evaluate()
'''


def best_program_script(program: str, scorer: ProgramScorer) -> str:
    """The text of `best_action.py`: `program`, and a main part that scores it.

    It prepares and runs the program as the sandbox does (seeds, one thread, order of classes) and
    prints the ROC AUC on the held-out rows, the number of `ProgramScorer.held_out`; under
    `protocol="paper"`, which holds no rows out, the mean over fresh 50/50 splits.
    """
    dataset = scorer.dataset
    functions = "\n\n".join(inspect.getsource(function) for function in (impute, roc_auc))
    held_out = len(scorer.held_out_rows) > 0
    return _TEMPLATE.format(
        title=f"The best program found for {dataset.name}.",
        data_file=DATA_FILE,
        program=program.rstrip(),
        measure="held-out ROC AUC" if held_out else "mean ROC AUC over fresh 50/50 splits",
        functions=textwrap.indent(functions, "    ").rstrip(),
        categorical=np.flatnonzero(dataset.categorical).tolist(),
        n_classes=dataset.n_classes,
        n_splits=scorer.n_splits,
        seed=scorer.program_seed(program),
    )


def write_program_data(scorer: ProgramScorer, folder: Path) -> Path:
    """Write `best_action_data.csv` into `folder` and return its path.

    Columns: the encoded features (an empty cell is missing), the class number, and `split`, which
    is `reward` or `held_out`.
    """
    dataset = scorer.dataset
    split = np.full(len(dataset.target), "reward", dtype=object)
    split[scorer.held_out_rows] = "held_out"
    table = pd.DataFrame(dataset.features)
    table["class"] = dataset.target
    table["split"] = split
    file = Path(folder) / DATA_FILE
    with written(file) as part:
        table.to_csv(part, index=False, header=[*dataset.feature_names, "class", "split"])
    return file
