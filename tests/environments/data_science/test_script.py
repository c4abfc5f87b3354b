import subprocess
import sys

import numpy as np
import pytest

from etpo.environments.data_science.datasets import load_dataset
from etpo.environments.data_science.scoring import ProgramScorer
from etpo.environments.data_science.script import best_program_script, write_program_data

# `impute` and `pd` are names that the file's own part uses too; the seed decides the forest
FOREST = '''\
from __future__ import annotations
from sklearn.ensemble import RandomForestClassifier

pd = """a string with {braces}"""

def impute(x):
    return -x

def build_model(x_train, y_train):
    return RandomForestClassifier(10).fit(impute(x_train), y_train)
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


@pytest.mark.parametrize("name", ["health_insurance", "cmc"])
def test_the_file_prints_the_held_out_score(name, data_dir, tmp_path, sandbox):
    dataset = load_dataset("csv", path=str(data_dir / f"{name}.csv"))
    scorer = ProgramScorer(dataset, sandbox, split_seed=5, seed=7)
    (score,) = scorer.held_out([FOREST])
    assert write_program_data(scorer, tmp_path) == tmp_path / "best_action_data.csv"
    printed = run(best_program_script(FOREST, scorer), tmp_path)
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
    import pandas as pd

    dataset = load_dataset("health_insurance", data_dir=str(data_dir))
    scorer = ProgramScorer(dataset, sandbox)
    table = pd.read_csv(write_program_data(scorer, tmp_path), float_precision="round_trip")
    assert list(table.columns) == [*dataset.feature_names, "class", "split"]
    np.testing.assert_array_equal(table.iloc[:, :-2].to_numpy(dtype=float), dataset.features)
    np.testing.assert_array_equal(table["class"], dataset.target)
    assert np.flatnonzero(table["split"] == "held_out").tolist() == scorer.held_out_rows.tolist()
