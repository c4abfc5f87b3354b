"""Write the best program as a script that runs without this package.

`best_action.py` needs `best_action_data.csv`, scikit-learn, and the imports of the program.
"""

import inspect
import textwrap
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd

from etpo.files import written
from etpo_tasks.data_science.scoring import ProgramScorer, impute, roc_auc

DATA_FILE = "best_action_data.csv"


def best_program_script(program: str, scorer: ProgramScorer) -> str:
    """Return the text of `best_action.py`: `program` and a main part that scores it.

    The script runs the program like the sandbox (seeds, one thread, order of classes). It prints
    the held-out ROC AUC, equal to `ProgramScorer.held_out`. With `protocol="paper"`, which holds no
    rows out, it prints the mean ROC AUC over new 50/50 splits.
    """
    functions = "\n\n".join(inspect.getsource(function) for function in (impute, roc_auc))
    held_out = len(scorer.held_out_rows) > 0
    template = Path(__file__).with_name("best_action.py.txt").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=f"The best program found for {scorer.dataset.name}.",
        data_file=DATA_FILE,
        program=program.rstrip(),
        measure="held-out ROC AUC" if held_out else "mean ROC AUC over fresh 50/50 splits",
        functions=textwrap.indent(functions, "    ").rstrip(),
        categorical=np.flatnonzero(scorer.dataset.categorical).tolist(),
        n_classes=scorer.dataset.n_classes,
        n_splits=scorer.n_splits,
        seed=scorer.program_seed(program),
    )


def write_program_data(scorer: ProgramScorer, folder: Path) -> Path:
    """Write `best_action_data.csv` into `folder` and return its path.

    Columns: the encoded features (empty if missing), the class number, and `split` (`reward` or
    `held_out`).
    """
    dataset = scorer.dataset
    table = pd.DataFrame(dataset.features)
    table["class"] = dataset.target
    table["split"] = "reward"
    table.loc[scorer.held_out_rows, "split"] = "held_out"
    file = Path(folder) / DATA_FILE
    with written(file) as part:
        table.to_csv(part, index=False, header=[*dataset.feature_names, "class", "split"])
    return file
