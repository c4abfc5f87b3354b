"""Training data: prompts of the data-science task, each with one answer from the grammar."""

import random
from typing import NamedTuple

from etpo_tasks.data_science.prompts import Attempt, Task, observation, program_from_action
from tiny_lm import grammar
from tiny_lm.mistakes import PACKAGES

FIRST_RATE = 0.6
REPAIR_RATE = 0.25
ODD_REPAIR_RATE = 0.2
KNOWN_NAMES = (
    "tic_tac_toe balance_scale breast_w credit_g diabetes iris wine adult bank_marketing car "
    "churn heart_disease titanic digits spambase mushroom vehicle segment vowel sonar ionosphere "
    "glass zoo yeast ecoli phoneme data dataset train my_data customers sales survey patients "
    "table1 test_set sensor_readings blood_transfusion letter german_credit"
)
SYLLABLES = (
    "al an ar ba be bi car co cra da de di do el en er fa fi ga gra ha he il in ka ki la le li lo "
    "ma me mi mo na ne no o or pa pe pi pro ra re ri ro sa se si so sta ta te ti to tra tu un ur "
    "va ve vi wa we wi za"
)
PACKAGE_PATHS = (
    PACKAGES,
    "/usr/local/lib/python3.12/site-packages/sklearn",
    "/opt/venv/lib/python3.13/site-packages/sklearn",
    "/home/user/project/.venv/lib/python3.11/site-packages/sklearn",
    "sklearn",
)
ODD_ERRORS = (
    "TimeoutError: more than 10 CPU seconds",
    "TimeoutError: idle for more than 10 seconds",
    "MemoryError: more than 2048 MiB",
    "MemoryError: Unable to allocate 12.4 GiB for an array with shape (40000, 41600)",
    "RuntimeError: the program ended the process (signal 9)",
    "RuntimeError: the program failed without a message",
    "ValueError: predict_proba returned NaN or infinite values",
    "ValueError: predict_proba returned shape (287,), expected (287, 2)",
    "ValueError: Input X contains NaN.",
    "ValueError: could not convert string to float: 'x'",
    "IndentationError: unexpected indent (line 3)",
    "IndentationError: expected an indented block after function definition on line 1 (line 2)",
    "SyntaxError: invalid syntax (line 2)",
    "SyntaxError: unterminated string literal (detected at line 4) (line 4)",
    "NameError: name 'build_model' is not defined",
    "TypeError: build_model() takes 0 positional arguments but 2 were given",
    "KeyError: 'Class'",
    "IndexError: list index out of range",
    "RecursionError: maximum recursion depth exceeded",
    "ZeroDivisionError: division by zero",
    "PermissionError: [Errno 13] Permission denied: '/etc/passwd'",
)
PUNCTUATION = "()[]{}=+-*/.,:;_'\"# \n"


class Example(NamedTuple):
    """A prompt, its answer, and the kind of prompt: `first`, `repair` or `improve`."""

    prompt: str
    action: str
    kind: str


def sample_name(rng: random.Random) -> str:
    """Draw a data set name: a real one, or one or two invented words with an optional number."""
    if rng.random() < 0.25:
        return rng.choice(KNOWN_NAMES.split())
    words = (
        "".join(rng.choices(SYLLABLES.split(), k=rng.randint(1, 4)))
        for _ in range(rng.randint(1, 2))
    )
    number = str(rng.randint(1, 20)) if rng.random() < 0.15 else ""
    return rng.choice("__-").join(words) + number


def sample_task(rng: random.Random) -> Task:
    """Draw a task with 30 to 60,000 training rows, 2 to 100 features and 2 to 10 classes."""
    classes = 2 if rng.random() < 0.65 else rng.randint(3, 10)
    rows, features = int(10 ** rng.uniform(1.5, 4.78)), int(10 ** rng.uniform(0.31, 2.0))
    return Task(sample_name(rng), rows, features, classes)


def _malformed(rng: random.Random) -> str:
    """Draw text that is not a program: a truncated or shuffled program, or random characters."""
    choice = rng.random()
    body = grammar.sample(rng).render()
    if choice < 0.3:
        return body[: rng.randint(0, len(body))]
    if choice < 0.6:
        lines = body.splitlines(keepends=True) * rng.randint(1, 6)
        return "".join(rng.sample(lines, len(lines)))
    syllables = SYLLABLES.split()
    words = [rng.choice(syllables) + rng.choice(PUNCTUATION) for _ in range(rng.randint(1, 40))]
    if choice < 0.7:
        words *= rng.randint(1, 6)
    if choice > 0.95:
        words += [chr(rng.randint(32, 0x2FFF)) for _ in range(20)]
    return "".join(words)


def _odd_failure(rng: random.Random) -> tuple[str, str]:
    """Draw (failed action, error) with an error outside the grammar."""
    body = grammar.sample(rng).render() if rng.random() < 0.4 else _malformed(rng)
    error = rng.choice(ODD_ERRORS)
    if rng.random() < 0.3:
        known = grammar.sample(rng, mistake_rate=1.0).error()
        error = known[: rng.randint(0, len(known))]
    if rng.random() < 0.2:
        error = error[: rng.randint(0, len(error))] + _malformed(rng)[:60]
    return body, error


def sample_example(rng: random.Random) -> Example:
    """Draw one prompt with its answer."""
    task = sample_task(rng)
    draw = rng.random()
    if draw < FIRST_RATE:
        last, answer, kind = None, grammar.sample(rng), "first"
    elif draw < FIRST_RATE + REPAIR_RATE:
        kind = "repair"
        if rng.random() < ODD_REPAIR_RATE:
            body, error = _odd_failure(rng)
            answer = grammar.sample(rng)
        else:
            failed, answer = grammar.sample_repair(rng)
            body = failed.render()
            error = failed.error().replace(PACKAGES, rng.choice(PACKAGE_PATHS))
        last = Attempt(program_from_action(body), error, None)
    else:
        working, score, answer = grammar.sample_improvement(rng)
        last, kind = Attempt(program_from_action(working.render()), None, score), "improve"
    return Example(observation(task, last)["prefix"], answer.render(), kind)
