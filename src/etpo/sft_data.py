"""Examples of `etpo-sft`: prompts with answers from JSONL files, episodes and a generator."""

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etpo.environments import validation
from etpo.environments.text_env import FIELDS, TextObservation
from etpo.errors import ConfigError, one_line, reason

PROGRAMS = "programs"  # the source of generated programs
PROGRAMS_PER_TASK, REPAIRS_PER_TASK = 8, 1
FORMS = (
    '{"prompt", "answer"}, {"instruction", "prefix", "answer"} with optional "suffix" and '
    '"messages", {"messages"} that end with the assistant, and the lines of episodes.jsonl'
)


class Example(NamedTuple):
    """An answer to an observation; place: the file and line of a message about it."""

    observation: TextObservation
    answer: str
    place: str


# consecutive turns of one conversation; each continues the one before
Conversation = list[Example]


def read_examples(
    source: str,
    *,
    chat: bool,
    seed: int,
    num_programs: int,
    mistake_rate: float,
    top_share: float,
    min_return: float | None,
) -> list[Conversation]:
    """Read or generate the examples of `data.source`.

    Args:
        chat: whether the model's prompts are rendered by a chat template.
        seed: of generated programs.
        num_programs, mistake_rate: arguments of `programs`.
        top_share, min_return: arguments of `best_actions`.

    Raises:
        ConfigError: the file cannot be read, or a line is no example.
    """
    if source == PROGRAMS:
        return [[example] for example in programs(num_programs, mistake_rate, seed, fenced=chat)]
    lines = list(read_lines(source))
    if lines and {"action", "reward"} <= set(lines[0][1]):
        return [[example] for example in best_actions(lines, top_share, min_return)]
    found = [conversation(place, line, chat) for place, line in lines]
    if not found:
        raise ConfigError(f"data.source={source}: the file is empty; allowed are lines {FORMS}")
    return found


def read_lines(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and content of each line of a JSONL file that is not blank."""
    path = Path(str(source)).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"data.source={source}: cannot be read ({reason(error)}); allowed are a JSONL file and "
            f"{PROGRAMS}"
        ) from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        place = f"{source}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:  # of the encoding too
            raise ConfigError(
                f"{place}: not JSON ({one_line(str(error), 100)}); allowed are lines {FORMS}"
            ) from error
        if not isinstance(value, dict):
            raise ConfigError(f"{place}: {validation.shown(value)}; allowed are lines {FORMS}")
        yield place, value


def conversation(place: str, line: dict[str, Any], chat: bool) -> Conversation:
    """Return the examples of a line: one, or one for each turn of the assistant."""
    with validation.error_prefix(place):
        if "answer" in line and "prompt" in line:
            prompt = validation.text("prompt", line["prompt"])
            observation = TextObservation(instruction=prompt, prefix=prompt, suffix="")
        elif "answer" in line and {"instruction", "prefix"} & set(line):
            given = {key: value for key, value in line.items() if key != "answer"}
            observation = validation.observation(dict.fromkeys(FIELDS, "") | given)
        elif "messages" in line and "answer" not in line:
            return turns(place, line["messages"], chat)
        else:
            keys = ", ".join(map(str, line))
            raise ConfigError(f"the keys are {one_line(keys, 80)}; allowed are lines {FORMS}")
        return [Example(observation, validation.text("answer", line["answer"]), place)]


def turns(place: str, values: Any, chat: bool) -> Conversation:
    """Return one example for each message of the assistant."""
    messages = [*map(validation.message, validation.several("messages", values))]
    if not chat:
        raise ConfigError(
            "messages need a chat template, model/prompt=chat; allowed without one are lines "
            '{"prompt", "answer"}'
        )
    examples = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0 or messages[number - 1]["role"] != "user":
            raise ConfigError(
                f"messages[{number}] is the assistant's; allowed is one after a message of the user"
            )
        before = messages[number - 1]["content"]
        observation = TextObservation(instruction=before, prefix="", suffix="")
        if number > 1:
            observation["messages"] = tuple(messages[: number - 1])
        examples.append(Example(observation, message["content"], place))
    if not messages or messages[-1]["role"] != "assistant":
        raise ConfigError("messages: allowed are ones that end with the assistant")
    return examples


def best_actions(
    lines: Sequence[tuple[str, dict[str, Any]]], top_share: float, min_return: float | None
) -> list[Example]:
    """Return the best distinct actions of each observation of `episodes.jsonl`.

    An action's return is the sum of the rewards from it to the end of its episode. An action that
    was cut off at the length limit has no end to fit and is left out.

    Args:
        top_share: share of an observation's actions that is kept, rounded up.
        min_return: least return of an action that is kept; None: any.
    """
    observations, ahead = {}, defaultdict(float)
    found: dict[str, dict[str, tuple[float, str]]] = defaultdict(dict)
    for place, line in reversed(lines):
        with validation.error_prefix(place):
            missing = {"env", "attempt", "action", "reward", "observation"} - set(line)
            if missing:
                raise ConfigError(
                    f"no {min(missing)}; allowed are the actions of a run of this version"
                )
            stream = tuple(line.get(key) for key in ("iteration", "rank", "policy", "episode"))
            stream += (line["env"],)
            ahead[stream] += validation.reward(line["reward"])
            total = ahead[stream]
            if line["attempt"] == 1:  # the line before is of an earlier episode
                del ahead[stream]
            if line.get("length_limited") or (min_return is not None and total < min_return):
                continue
            observation = validation.observation(line["observation"])
            key, action = repr(observation), validation.text("action", line["action"])
        observations[key] = observation
        if action not in found[key] or found[key][action][0] <= total:
            found[key][action] = total, place
    examples = []
    for key, actions in found.items():
        ranked = sorted(actions.items(), key=lambda item: -item[1][0])
        for action, (_, place) in ranked[: math.ceil(top_share * len(ranked))]:
            examples.append(Example(observations[key], action, place))
    if not examples:
        raise ConfigError(
            f"data.min_return={min_return}: none of {len(lines)} actions has this return and an "
            "end; allowed is a smaller value, and a run with a larger rollout.max_new_tokens"
        )
    return examples


def programs(count: int, mistake_rate: float, seed: int, *, fenced: bool) -> list[Example]:
    """Draw scikit-learn programs for prompts of the data-science task on invented data sets.

    Of each data set there are `PROGRAMS_PER_TASK` first programs and `REPAIRS_PER_TASK` repaired
    ones. No data set is loaded and no program is run.

    Args:
        mistake_rate: share of first programs with a mistake.
        fenced: answer with a block of code, as chat models do.
    """
    try:
        from tiny_lm import corpus, grammar
    except ImportError as error:
        raise ConfigError(
            f"data.source={PROGRAMS}: needs the folder src/tiny_lm of the repository, which an "
            "installed wheel leaves out; allowed is a JSONL file"
        ) from error
    from etpo_tasks.data_science import prompts

    rng = random.Random(seed)
    examples: list[Example] = []
    while len(examples) < count:
        task = corpus.sample_task(rng)
        drawn = [(None, grammar.sample(rng, mistake_rate)) for _ in range(PROGRAMS_PER_TASK)]
        for _ in range(REPAIRS_PER_TASK):
            failed, answer = grammar.sample_repair(rng)
            wrong = prompts.program_from_action(failed.render())
            attempt = prompts.Attempt(wrong, failed.error(), None)
            drawn.append((attempt, answer._replace(mistake=None)))
        for last, answer in drawn:
            text = answer.render()
            text = f"```python\n{prompts.HEADER}{text}```" if fenced else text
            observation = prompts.observation(task, last)
            examples.append(Example(observation, text, PROGRAMS))
    return examples[:count]
