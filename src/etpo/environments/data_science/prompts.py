"""What the agent reads and how its answer becomes a program.

Three prompts: the first attempt, the repair prompt (error and failed code) and the improve prompt
(working program and its score). All continue the line `def build_model(x_train, y_train):`.
"""

import re
from typing import NamedTuple

from etpo.environments.text_env import TextObservation

HEADER = "def build_model(x_train, y_train):\n"
SUFFIX = "\n\nmodel = build_model(x_train, y_train)\nprobabilities = model.predict_proba(x_test)\n"
MAX_PROGRAM_CHARACTERS = 2000
MAX_ERROR_CHARACTERS = 200
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


def program_from_action(action: str) -> str:
    """The program that an action stands for.

    A fenced block is unwrapped; an answer that defines `build_model` itself is taken as it is; all
    other text is the body of `build_model`.
    """
    fence = _FENCE.search(action)
    text = fence.group(1) if fence else action
    return text if re.search(r"^def build_model\(", text, re.MULTILINE) else HEADER + text


def observation(task: Task, last: Attempt | None = None) -> TextObservation:
    """The first-attempt prompt, or the repair or improve prompt that `last` calls for.

    The failed program is cut to its first `MAX_PROGRAM_CHARACTERS` characters, the error to its
    first `MAX_ERROR_CHARACTERS`; line breaks in the error become spaces.
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
    if last is not None:
        program = last.program[:MAX_PROGRAM_CHARACTERS].rstrip() + "\n"
        if last.error is not None:
            error = " ".join(last.error.split())[:MAX_ERROR_CHARACTERS]
            instruction += (
                f"\nThis attempt failed with {error}\n```python\n{program}```\nRepair it."
            )
            prefix += f"# failed:\n{program}# {error}\n# repaired:\n"
        else:
            instruction += (
                f"\nThis program scores {last.score:.3f}:\n```python\n{program}```\nImprove it."
            )
            prefix += f"# scores {last.score:.3f}:\n{program}# improved:\n"
    instruction += f"\nAnswer with one Python code block that starts with\n{HEADER}"
    return {"instruction": instruction, "prefix": prefix + HEADER, "suffix": SUFFIX}
