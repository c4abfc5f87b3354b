"""The example of docs/environments.md, trained as the page says."""

import csv
import os
import re
import shlex
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "environments.md"


def rewards(folder):
    """The mean rewards of the one run below a working folder."""
    (run,) = (folder / "logs" / "train" / "runs").iterdir()
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["rollout/reward"]) for row in csv.DictReader(file)]


@pytest.fixture
def budget(small_run):
    return [a for a in small_run if not a.startswith("environment.")]


@pytest.mark.slow
def test_the_guides_environment_trains(start_train, tmp_path, monkeypatch, budget):
    section = GUIDE.read_text(encoding="utf-8").partition("## Your own environment")[2]
    program, command = re.findall(r"```(?:python|bash)\n(.*?)```", section, flags=re.DOTALL)[:2]
    assert len([line for line in program.splitlines() if line.strip()]) <= 40
    (tmp_path / "short_program.py").write_text(program, encoding="utf-8")
    variable, name, *arguments = shlex.split(command)
    assert (variable, name) == ("PYTHONPATH=.", "etpo-train")
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [".", path])))
    process = start_train(tmp_path, *arguments, *budget, "rollout.pipeline_groups=2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(rewards(tmp_path)) == 3
    assert all(-1 <= reward <= 1 for reward in rewards(tmp_path))
    assert "mean reward" in out
