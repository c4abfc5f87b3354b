"""What the agent reads and how its answer becomes a program.

Three prompts: the first attempt, the repair prompt (error and failed code) and the improve prompt
(working program and its score). Each may also carry a memory of earlier attempts. All continue the
line `def build_model(x_train, y_train):`.
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
_FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)(?:```|\Z)", re.DOTALL)


class Task(NamedTuple):
    """What a prompt names: data set, training rows in one split, features, classes."""

    name: str
    rows: int
    features: int
    classes: int


class Attempt(NamedTuple):
    """The last action: its program and either an error text or a score (mean ROC AUC)."""

    program: str
    error: str | None
    score: float | None


class Memory(NamedTuple):
    """What earlier attempts taught: the best program, and different errors, the latest last."""

    best: Attempt | None = None
    errors: tuple[str, ...] = ()


NO_MEMORY = Memory()


def remember(memory: Memory, attempts: Iterable[Attempt]) -> Memory:
    """`memory` with further attempts: the best (ties: the first) and the last different errors."""
    best, errors = memory
    for attempt in attempts:
        if attempt.error is None:
            if best is None or attempt.score > best.score:
                best = attempt
        else:
            error = _one_line(attempt.error)
            errors = (*(known for known in errors if known != error), error)
    return Memory(best, errors[-MAX_REMEMBERED_ERRORS:])


def _one_line(error: str) -> str:
    return " ".join(error.split())[:MAX_ERROR_CHARACTERS]


def program_from_action(action: str) -> str:
    """The program that an action stands for.

    A fenced block is unwrapped; an answer that defines `build_model` itself is taken as it is; all
    other text is the body of `build_model`.
    """
    fence = _FENCE.search(action)
    text = fence.group(1) if fence else action
    return text if re.search(r"^def build_model\(", text, re.MULTILINE) else HEADER + text


def observation(
    task: Task, last: Attempt | None = None, memory: Memory = NO_MEMORY
) -> TextObservation:
    """The first-attempt prompt, or the repair or improve prompt that the attempts call for.

    `memory` comes before `last`: its errors, a line each, then its best program. A program is cut
    to its first `MAX_PROGRAM_CHARACTERS` characters, an error to its first `MAX_ERROR_CHARACTERS`;
    line breaks in an error become spaces.
    """
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
