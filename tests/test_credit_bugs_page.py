"""docs/credit_bugs.md: every entry has a source, and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "credit_bugs.md"
TEXT = PAGE.read_text(encoding="utf-8")
ENTRY = re.compile(r"^(\d+)\. (\*\*.+?)(?=^\d+\. \*\*|^#|\Z)", re.DOTALL | re.MULTILINE)


def functions_of(file):
    """Return the names of a file's functions, and the ids of its parametrized tests."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return functions, functions | {node.id for node in nodes if isinstance(node, ast.Name)}


def faults(text):
    """Return what is wrong with the entries of a page, one line each."""
    found, numbers = [], []
    for number, entry in ENTRY.findall(text):
        numbers.append(int(number))
        mistake, source, *rest = entry.split("\\\n")
        if not re.search(r"\]\(https://[^)]+\)", source):
            found.append(f"{number}: no source")
        tests = re.findall(r"\[`(\w+)(?:\[(\w+)\])?`\]\((\S+)\)", rest[0] if rest else "")
        if not mistake or not tests:
            found.append(f"{number}: no test")
        for test, variant, path in tests:
            file = (PAGE.parent / path).resolve()
            functions, names = functions_of(file) if file.is_file() else (set(), set())
            if not test.startswith("test_") or test not in functions:
                found.append(f"{number}: {test} is not in {path}")
            if variant and variant not in names:
                found.append(f"{number}: {variant} is not in {path}")
    if numbers != list(range(1, len(numbers) + 1)):
        found.append(f"entries are numbered {numbers}")
    return found


def test_every_bug_has_a_source_and_a_test_that_exists():
    assert len(ENTRY.findall(TEXT)) > 30
    assert faults(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("test_critic_loss_by_hand", "test_critic_loss", "11: test_critic_loss is not in"),
        ("[kl_one_step_early]", "[kl_two_steps_early]", "1: kl_two_steps_early is not in"),
        ("tests/rollout/test_types.py", "tests/test_types.py", "19: test_rows_keep"),
        ("https://arxiv.org/abs/2601.10201", "", "26: no source"),
        ("\n2. **", "\n3. **", "entries are numbered [1, 3, 3"),
    ],
)
def test_a_wrong_entry_is_found(old, new, fault):
    assert any(found.startswith(fault) for found in faults(TEXT.replace(old, new, 1)))
