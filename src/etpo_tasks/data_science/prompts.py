"""Build the prompts of the data-science task and extract programs from actions.

There are three prompts: first attempt, repair (error and failed code) and improve (working program
and score). Each may include a memory of earlier attempts. All end with the line
`def build_model(x_train, y_train):`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from etpo.environments.text_env import TextObservation

HEADER = "def build_model(x_train, y_train):\n"
SUFFIX = "\n\nmodel = build_model(x_train, y_train)\nprobabilities = model.predict_proba(x_test)\n"
MAX_PROGRAM_CHARACTERS = 2000
MAX_ERROR_CHARACTERS = 200
MAX_REMEMBERED_ERRORS = 3  # Reflexion keeps one to three experiences
# A fenced block of CommonMark starts with three or more backticks or tildes and an info string. It
# ends at a fence of the same character and at least the same length, or at the end of the text.
# Any indentation is allowed, as in a list or after SentencePiece's first blank.
_BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>(?P<char>[`~])(?P=char){2,})[^`\n]*(?:\n|\Z)"
    r"(?P<body>.*?)(?:^[ \t]*(?P=fence)(?P=char)*[ \t\r]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_BODY = re.compile(r"\s*^(?: {2,}|\t)", re.MULTILINE)  # an indented first line
_DEFINITION = re.compile(r"^def\s+build_model\s*\(", re.MULTILINE)


class Task(NamedTuple):
    """Facts for the prompt: data set, training rows of one split, features, classes."""

    name: str
    rows: int
    features: int
    classes: int


class Attempt(NamedTuple):
    """A program and either its error text or its score (mean ROC AUC)."""

    program: str
    error: str | None
    score: float | None


class Memory(NamedTuple):
    """Results of earlier attempts: the best program and distinct errors, latest last."""

    best: Attempt | None = None
    errors: tuple[str, ...] = ()


NO_MEMORY = Memory()


def remember(memory: Memory, attempts: Iterable[Attempt]) -> Memory:
    """Keep the best attempt (the first on ties) and the last distinct errors."""
    best, errors = memory
    for attempt in attempts:
        if attempt.error is not None:
            error = _one_line(attempt.error)
            errors = (*(known for known in errors if known != error), error)
        elif best is None or attempt.score > best.score:
            best = attempt
    return Memory(best, errors[-MAX_REMEMBERED_ERRORS:])


def _one_line(error: str) -> str:
    return " ".join(error.split())[:MAX_ERROR_CHARACTERS]


def program_from_action(action: str) -> str:
    """Return the program of an action.

    Text that starts as code counts up to the first fence. Otherwise the program is the first fenced
    block that defines `build_model`, else the first block, else the whole text.
    """
    blocks = list(_BLOCK.finditer(action))
    text = action[: blocks[0].start()] if blocks else action
    if not _defines(text) and not _BODY.match(text):
        contents = [
            re.sub(f"^{block['indent']}", "", block["body"], flags=re.MULTILINE)
            for block in blocks
            if block["body"].strip()
        ]
        text = next(filter(_defines, contents), contents[0] if contents else text)
    return text.lstrip(" \t") if _defines(text) else HEADER + text


def _defines(text: str) -> bool:
    return _DEFINITION.search(text.lstrip(" \t")) is not None


def observation(
    task: Task, last: Attempt | None = None, memory: Memory = NO_MEMORY
) -> TextObservation:
    """Return the prompt of a first attempt, or the prompt to repair or improve `last`."""
    facts = (
        f"{task.name}: {task.rows} training rows, {task.features} features, {task.classes} classes"
    )
    instruction = (
        "Complete the Python function build_model(x_train, y_train). It must fit a scikit-learn "
        "classifier that has predict_proba and return it; the higher the ROC AUC on unseen rows, "
        f"the better. Data set: {facts}, float features in NumPy arrays."
    )
    prefix = f"# {facts}\n"
    for error in memory.errors:
        instruction += f"\nAn earlier attempt failed with {error}"
        prefix += f"# earlier error: {error}\n"
    attempts = [attempt for attempt in dict.fromkeys((memory.best, last)) if attempt is not None]
    for attempt in attempts:
        program = attempt.program[:MAX_PROGRAM_CHARACTERS].rstrip() + "\n"
        if attempt.error is not None:
            error = _one_line(attempt.error)
            instruction += f"\nThis attempt failed with {error}\n```python\n{program}```"
            prefix += f"# failed:\n{program}# {error}\n"
        else:
            score = f"scores {attempt.score:.3f}:\n"
            instruction += f"\nThis program {score}```python\n{program}```"
            prefix += f"# {score}{program}"
    if attempts:
        failed = attempts[-1].error is not None
        instruction += "\nRepair it." if failed else "\nImprove it."
        prefix += "# repaired:\n" if failed else "# improved:\n"
    instruction += f"\nAnswer with one Python code block that starts with\n{HEADER}"
    return {"instruction": instruction, "prefix": prefix + HEADER, "suffix": SUFFIX}
