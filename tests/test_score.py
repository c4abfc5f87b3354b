"""`etpo-score`: one program file in, one line of JSON out."""

import io
import json

import pytest

from etpo import score
from etpo_sandbox import Sandbox
from etpo_tasks.data_science.env import DataScienceEnv

WORKS = """from sklearn.tree import DecisionTreeClassifier
def build_model(x_train, y_train):
    return DecisionTreeClassifier(max_depth=3).fit(x_train, y_train)
"""


@pytest.fixture
def program(tmp_path):
    def write(text):
        file = tmp_path / "program.py"
        file.write_text(text)
        return file

    return write


def test_a_program_that_works_is_scored_as_an_action_is(command, program):
    ended = command(score.main, program(WORKS), "environment.n_splits=3")
    assert ended.status == 0, ended.err
    (line,) = ended.out.splitlines()
    told = json.loads(line)
    assert list(told) == ["reward", "split_aucs", "error", "cpu_seconds", "sandbox"]
    assert told["error"] is None
    assert len(told["split_aucs"]) == 3
    assert told["reward"] == pytest.approx(sum(told["split_aucs"]) / 3)
    assert told["cpu_seconds"] > 0
    environment = DataScienceEnv(dataset="tic_tac_toe", sandbox=Sandbox(workers=1), n_splits=3)
    try:
        assert told["reward"] == environment.scorer.score([WORKS])[0].reward
        assert told["sandbox"] == environment.sandbox_level
    finally:
        environment.close()


def test_a_program_that_fails_says_why(command, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("def build_model(x_train, y_train):\n  return x\n")
    )
    ended = command(score.main, "-", "environment.dataset=balance_scale")
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)
    assert (told["reward"], told["split_aucs"]) == (-1.0, None)
    assert told["error"] == "NameError: name 'x' is not defined"


def test_what_the_paper_refuses_is_not_run(command, program):
    text = "def build_model(x_train, y_train):\n    return GridSearchCV(None, {})\n"
    ended = command(score.main, program(text), "environment.protocol=paper")
    told = json.loads(ended.out)
    assert told["error"] == "RuntimeError: GridSearchCV is not allowed"
    assert told["cpu_seconds"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "error: program=nowhere.py: allowed is a UTF-8 text file or -"),
        (["-", "environment.dataset=nothing"], "error: environment.dataset=nothing"),
        (["-", "environment.datset=cmc"], "error: Could not override 'environment.datset'"),
        (["environment.dataset=iris"], "error: program=??? needs a value"),
    ],
)
def test_bad_input_is_one_line(command, monkeypatch, arguments, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(WORKS))
    ended = command(score.main, *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(message)
    assert len(ended.err.splitlines()) == 1
