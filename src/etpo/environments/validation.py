"""Validate the results of an environment and convert them to plain Python values.

Only finite numbers reach the weights; only plain text and numbers reach records and checkpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from etpo.environments.text_env import FIELDS, TextObservation
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


def step_result(returned: Any, count: int) -> StepResult:
    """Validate the five results of `TextVectorEnv.step` or `step_part` for `count` environments."""
    observations, rewards, terminated, truncated, infos = returned
    fields = {"observations": observations, "rewards": rewards, "terminations": terminated}
    fields |= {"truncations": truncated}
    for key in ("final_obs", "error", "cached"):
        if key not in infos:
            raise ConfigError(f"infos lacks {key}; allowed are final_obs, error, attempt, cached")
        fields[f"infos[{key!r}]"] = infos[key]
    for name, values in fields.items():
        check_count(name, values, count)
    return StepResult(
        [observation(value) for value in observations],
        [reward(value) for value in rewards],
        [flag("terminated", value) for value in terminated],
        [flag("truncated", value) for value in truncated],
        [None if value is None else observation(value) for value in infos["final_obs"]],
        [error_text(value) for value in infos["error"]],
        [flag("cached", value) for value in infos["cached"]],
    )


def observations(returned: Sequence[Any], count: int) -> list[TextObservation]:
    """Validate the first observations of `count` environments."""
    check_count("observations", returned, count)
    return [observation(value) for value in returned]


def check_count(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ConfigError(f"{len(values)} {name}: allowed are {count}, one per environment")


def observation(value: Any, fields: Sequence[str] = FIELDS) -> TextObservation:
    """Copy an observation that has exactly `fields`; other fields become empty."""
    if not isinstance(value, Mapping) or set(value) != set(fields):
        raise ConfigError(
            f"observation={shown(value)}: allowed is a dict with the keys {', '.join(fields)}"
        )
    texts = {key: text(f"observation[{key!r}]", value[key]) for key in fields}
    return TextObservation(**{field: texts.get(field, "") for field in FIELDS})


def reward(value: Any) -> float:
    """Return a finite reward; text, None and complex numbers are refused."""
    found = number(value)
    if found is None or not abs(found) <= MAX_REWARD:
        raise ConfigError(
            f"reward={shown(value)}: allowed is a finite number from -{MAX_REWARD:g} to "
            f"{MAX_REWARD:g}"
        )
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
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{name}={shown(value)}: allowed are bytes in UTF-8") from None
    if not isinstance(value, str):
        raise ConfigError(f"{name}={shown(value)}: allowed is text")
    return well_formed(value)


def error_text(value: Any) -> str | None:
    """Return an error as text of at most `MAX_ERROR` characters; None for false values."""
    try:
        if not value:
            return None
    except Exception:  # the truth value of an array of several values is undefined
        pass
    try:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    except Exception:
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
