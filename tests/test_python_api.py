"""The plain Python example of README, as a script and as a notebook cell."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def example():
    """Return the Python block of README's section, with four iterations."""
    section = README.read_text().split("## Plain Python")[1]
    code = section.split("```python\n")[1].split("```")[0]
    shorter = code.replace("max_epochs=20", "max_epochs=4")
    assert shorter != code
    return shorter


def reward(output):
    (line,) = [line for line in output.splitlines() if line.startswith("tensor(")]
    return float(line.removeprefix("tensor(").removesuffix(")"))


def test_script(example, tmp_path):
    (tmp_path / "example.py").write_text(example)
    command = [sys.executable, "example.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert 0.4 < reward(run.stdout) < 1  # 0.32 in the first iteration, 0.60 in the fourth


@pytest.mark.slow
def test_notebook_cell(example, tmp_path):
    cell = nbformat.v4.new_code_cell(example)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute()
    assert 0.4 < reward("".join(o.get("text", "") for o in notebook.cells[0].outputs)) < 1
