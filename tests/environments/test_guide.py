"""The environment that the guide in docs/environments.md builds, trained as the guide says."""

import csv
import re
import shlex
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.mark.slow
def test_the_guides_environment_trains(start_train, tmp_path, monkeypatch, small_run):
    section = GUIDE.read_text(encoding="utf-8").partition("## Your own environment")[2]
    program, command = re.findall(r"```(?:python|bash)\n(.*?)```", section, flags=re.DOTALL)[:2]
    assert len([line for line in program.splitlines() if line.strip()]) <= 40
    (tmp_path / "short_program.py").write_text(program, encoding="utf-8")
    variable, name, *arguments = shlex.split(command)
    assert (variable, name) == ("PYTHONPATH=.", "etpo-train")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    budget = [a for a in small_run if not a.startswith("environment.")]
    process = start_train(tmp_path, *arguments, *budget, "rollout.groups=2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder,) = (tmp_path / "logs" / "train" / "runs").iterdir()
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert all(-1 <= float(row["rollout/reward"]) <= 1 for row in rows)
    assert "mean reward" in out
