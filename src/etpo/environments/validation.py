"""Validate the results of an environment and convert them to plain Python values.

Only finite numbers reach the weights; only plain text and numbers reach records and checkpoints.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from etpo.environments.text_env import FIELDS, ROLES, Message, TextObservation, TextVectorEnv
from etpo.errors import ConfigError, one_line

MAX_REWARD = 1e15  # squares of such rewards, and their sums, are finite in float32
MAX_ERROR = 2000  # characters of an error text


class StepResult(NamedTuple):
    """Validated result of `TextVectorEnv.step` for n environments; each field has length n."""

    observations: list[TextObservation]
    rewards: list[float]
    terminated: list[bool]
    truncated: list[bool]
    final_obs: list[TextObservation | None]
    errors: list[str | None]
    cached: list[bool]


def reset(environment: TextVectorEnv, seed: int, *, evaluation: bool) -> list[TextObservation]:
    """Start new episodes in all environments and return the validated observations."""
    first, _ = environment.reset(seed=seed, options={"evaluation": evaluation})
    with error_prefix(f"environment {environment.task_name}"):
        return column("observations", first, environment.num_envs, observation)


def step_result(environment: TextVectorEnv, returned: Any, count: int) -> StepResult:
    """Validate the five results of a `step` or `step_part` of `count` environments."""
    following, rewards, terminated, truncated, infos = returned
    with error_prefix(f"environment {environment.task_name}"):
        for key in ("final_obs", "error", "cached"):
            if key not in infos:
                allowed = "final_obs, error, attempt, cached"
                raise ConfigError(f"infos lacks {key}; allowed are {allowed}")
        return StepResult(
            column("observations", following, count, observation),
            column("rewards", rewards, count, reward),
            column("terminations", terminated, count, partial(flag, "terminated")),
            column("truncations", truncated, count, partial(flag, "truncated")),
            column("infos['final_obs']", infos["final_obs"], count, final_observation),
            column("infos['error']", infos["error"], count, error_text),
            column("infos['cached']", infos["cached"], count, partial(flag, "cached")),
        )


def column(name: str, values: Sequence[Any], count: int, validate: Callable[[Any], Any]) -> list:
    """Validate one value per environment."""
    if len(values) != count:
        raise ConfigError(f"{len(values)} {name}: allowed are {count}, one per environment")
    return [validate(value) for value in values]


def observation(value: Any, fields: Sequence[str] = FIELDS) -> TextObservation:
    """Copy an observation that has exactly the texts `fields`; other texts become empty.

    `messages` and `choices` are optional.
    """
    found = set(value) - {"messages", "choices"} if isinstance(value, Mapping) else None
    if found != set(fields):
        keys = ", ".join(fields)
        raise ConfigError(
            f"observation={shown(value)}: allowed is a dict with the keys {keys}, and optional "
            "messages and choices"
        )
    texts = {key: text(f"observation[{key!r}]", value[key]) for key in fields}
    copied = TextObservation(**{field: texts.get(field, "") for field in FIELDS})
    if value.get("messages"):
        copied["messages"] = tuple(map(message, several("messages", value["messages"])))
    if value.get("choices") is not None:
        copied["choices"] = choices(value["choices"])
    return copied


def message(value: Any) -> Message:
    """Copy a turn of a conversation."""
    if not isinstance(value, Mapping) or set(value) != {"role", "content"}:
        allowed = "a dict with the keys role, content"
        raise ConfigError(f"observation['messages']: {shown(value)}: allowed is {allowed}")
    role, content = (text(f"observation['messages']: {k}", value[k]) for k in ("role", "content"))
    if role not in ROLES:
        raise ConfigError(
            f"observation['messages']: role={shown(role)}: allowed are {', '.join(ROLES)}"
        )
    return Message(role=role, content=content)


def choices(values: Any) -> tuple[str, ...]:
    """Copy the admissible actions: at least one, all different."""
    texts = tuple(text("observation['choices']", value) for value in several("choices", values))
    repeated = next((one for one, count in Counter(texts).items() if count > 1), None)
    if not texts or repeated is not None:
        fault = "empty" if not texts else f"{shown(repeated)} occurs twice"
        raise ConfigError(
            f"observation['choices']: {fault}; allowed are one or more different texts"
        )
    return texts


def several(key: str, values: Any) -> Sequence[Any]:
    """Return a list, tuple or array of one dimension."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise ConfigError(f"observation[{key!r}]={shown(values)}: allowed is a list or tuple")
    return values


def final_observation(value: Any) -> TextObservation | None:
    """Copy the last observation of an episode that ended, else None."""
    return None if value is None else observation(value)


def reward(value: Any) -> float:
    """Return a finite reward; text, None and complex numbers are refused."""
    found = number(value)
    if found is None or not abs(found) <= MAX_REWARD:
        span = f"from -{MAX_REWARD:g} to {MAX_REWARD:g}"
        raise ConfigError(f"reward={shown(value)}: allowed is a finite number {span}")
    return found


def flag(name: str, value: Any) -> bool:
    """Return a truth value, which may be the number 0 or 1."""
    found = number(value)
    if found not in (0, 1):
        raise ConfigError(f"{name}={shown(value)}: allowed are true and false")
    return bool(found)


def number(value: Any) -> float | None:
    """Return the one real number in a value, array or tensor; None for anything else."""
    if hasattr(value, "numel"):  # a tensor of PyTorch
        value = value.item() if value.numel() == 1 else None
    elif hasattr(value, "__array__"):
        array = np.asarray(value)
        value = array.item() if array.size == 1 and array.dtype.kind in "biufO" else None
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")
    except ValueError:  # a signalling NaN
        return float("nan")


def text(name: str, value: Any) -> str:
    """Return valid Unicode: lone surrogates become U+FFFD, bytes are decoded as UTF-8."""
    try:
        value = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise ConfigError(f"{name}={shown(value)}: allowed are bytes in UTF-8") from None
    if not isinstance(value, str):
        raise ConfigError(f"{name}={shown(value)}: allowed is text")
    return well_formed(value)


def error_text(value: Any) -> str | None:
    """Return an error as text of at most `MAX_ERROR` characters; None for false values."""
    with suppress(Exception):  # the truth value of an array of several values is undefined
        if not value:
            return None
    try:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    except Exception:  # a faulty __str__
        text = ""
    return well_formed(text or type(value).__name__)[:MAX_ERROR]


def well_formed(value: str) -> str:
    """Return valid Unicode: surrogate pairs become their character, lone ones U+FFFD."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shown(value: Any) -> str:
    """Return the repr of a value in one short line."""
    try:
        return one_line(repr(value), 80)
    except Exception:  # a faulty __repr__
        return type(value).__name__


@contextmanager
def error_prefix(source: str) -> Iterator[None]:
    """Prefix the ConfigErrors raised inside with `source`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
