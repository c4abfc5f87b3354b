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
# A fence of CommonMark: three or more backticks or tildes on a line, and at the start of a block an
# info string. Any indentation is allowed, as in a list or after SentencePiece's first blank.
_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)")
_BODY = re.compile(r"\s*^(?: {2,}|\t)", re.MULTILINE)  # a first line that is indented
_DEFINITION = re.compile(r"^def\s+build_model\s*\(", re.MULTILINE)


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

    The first fenced block that defines `build_model` is unwrapped, else the first block; a text
    that defines `build_model` itself is taken as it is; all other text is the body of
    `build_model`. A fence below a body only ends it.
    """
    text, blocks = _fenced_blocks(action)
    if blocks and not _defines(text) and not _BODY.match(text):
        text = next((block for block in blocks if _defines(block)), blocks[0])
    return text.lstrip(" \t") if _defines(text) else HEADER + text


def _defines(text: str) -> bool:
    return _DEFINITION.search(text.lstrip(" \t")) is not None


def _fenced_blocks(text: str) -> tuple[str, list[str]]:
    """The text before the first fence, and the contents of all fenced blocks that have some.

    A block ends with a fence of the same character that is at least as long, or with the text; its
    lines lose the indentation of its first fence.
    """
    before: list[str] = []
    blocks: list[list[str]] = []
    opening: re.Match[str] | None = None
    for line in text.splitlines(keepends=True):
        fence = _FENCE.fullmatch(line.rstrip())
        if opening is None and fence:
            opening = fence
            blocks.append([])
        elif opening is None:
            before += [] if blocks else [line]
        elif (
            fence
            and not fence["info"]
            and fence["fence"][0] == opening["fence"][0]
            and len(fence["fence"]) >= len(opening["fence"])
        ):
            opening = None
        else:
            blocks[-1].append(line.removeprefix(opening["indent"]))
    contents = ("".join(lines) for lines in blocks)
    return "".join(before), [content for content in contents if content.strip()]


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
