import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from etpo_tasks.data_science.datasets import load_dataset
from etpo_tasks.data_science.scoring import ProgramScorer
from etpo_tasks.data_science.script import best_program_script, write_program_data

# The probabilities follow from every bit of the arrays and from the seed; `impute` and `pd` are
# names that the file's own part uses too.
FINGERPRINT = '''\
from __future__ import annotations
import zlib
import numpy as np

pd = """a string with {braces}"""

def impute(x):
    return x.tobytes()

class Model:
    def __init__(self, x_train, y_train):
        self.data = impute(x_train) + impute(y_train)
        self.n_classes = y_train.max() + 1

    def predict_proba(self, x_test):
        noise = np.random.RandomState(zlib.crc32(self.data + impute(x_test)))
        p = noise.rand(len(x_test), self.n_classes) + np.random.rand()
        return p / p.sum(axis=1, keepdims=True)

def build_model(x_train, y_train):
    return Model(x_train, y_train)
'''


def run(script, folder):
    file = folder / "best_action.py"
    file.write_text(script, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-I", str(file)], capture_output=True, text=True, cwd="/", timeout=60
    )
    assert result.returncode == 0, result.stderr
    name, value = result.stdout.strip().rsplit(": ", 1)
    return name, float(value)


@pytest.mark.parametrize("name", ["health_insurance", "cmc", "normal"])
def test_the_file_prints_the_held_out_score(name, data_dir, tmp_path, sandbox):
    """Missing cells and categories; three classes; numbers of 17 digits."""
    file = data_dir / f"{name}.csv"
    if name == "normal":
        file = tmp_path / "normal.csv"
        numbers = np.random.default_rng(0).normal(size=(200, 4))
        pd.DataFrame(numbers).assign(y=np.arange(200) % 2).to_csv(file, index=False)
    dataset = load_dataset("csv", path=str(file))
    scorer = ProgramScorer(dataset, sandbox, split_seed=5)
    (score,) = scorer.held_out([FINGERPRINT])
    assert score.error is None
    assert write_program_data(scorer, tmp_path) == tmp_path / "best_action_data.csv"
    printed = run(best_program_script(FINGERPRINT, scorer), tmp_path)
    assert printed == ("held-out ROC AUC", pytest.approx(score.reward, abs=5e-7))


def test_without_held_out_rows_it_draws_fresh_splits(tmp_path, sandbox):
    program = (
        "from sklearn.naive_bayes import GaussianNB\n"
        "def build_model(x_train, y_train):\n    return GaussianNB().fit(x_train, y_train)"
    )
    scorer = ProgramScorer(load_dataset("wine"), sandbox, protocol="paper")
    write_program_data(scorer, tmp_path)
    name, value = run(best_program_script(program, scorer), tmp_path)
    assert name == "mean ROC AUC over fresh 50/50 splits"
    (score,) = scorer.score([program])
    assert value == pytest.approx(score.reward, abs=0.01)
    assert np.isfinite(value)


def test_the_data_file_is_exact(data_dir, tmp_path, sandbox):
    dataset = load_dataset("health_insurance", data_dir=str(data_dir))
    scorer = ProgramScorer(dataset, sandbox)
    table = pd.read_csv(write_program_data(scorer, tmp_path))
    assert list(table.columns) == [*dataset.feature_names, "class", "split"]
    np.testing.assert_allclose(table.iloc[:, :-2].to_numpy(dtype=float), dataset.features)
    np.testing.assert_array_equal(table["class"], dataset.target)
    assert np.flatnonzero(table["split"] == "held_out").tolist() == scorer.held_out_rows.tolist()
