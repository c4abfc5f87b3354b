"""What an environment sends, as plain Python values; everything else is refused in one line.

Checked where it comes in, once: nothing that is no finite number reaches the weights, and nothing
but plain text and numbers reaches records, JSON and checkpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from etpo.environments.text_env import TextObservation
from etpo.errors import ConfigError, one_line

MAX_REWARD = 1e15  # squares of such rewards, and their sums, are finite in float32
MAX_ERROR = 2000  # characters of an error that are kept
FIELDS = tuple(TextObservation.__annotations__)


@contextmanager
def sent_by(source: str) -> Iterator[None]:
    """Puts `source` in front of the ConfigErrors that are raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def number(value: Any) -> float | None:
    """The one real number that a value holds, also as an array or a tensor; None for others."""
    if isinstance(value, torch.Tensor):
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


def reward(value: Any) -> float:
    """A finite reward. Text, None and complex numbers are none."""
    found = number(value)
    if found is None or not abs(found) <= MAX_REWARD:
        raise ConfigError(
            f"reward={shown(value)}: allowed is a finite number from -{MAX_REWARD:g} to "
            f"{MAX_REWARD:g}"
        )
    return found


def flag(name: str, value: Any) -> bool:
    """A truth value, also as the number 0 or 1."""
    found = number(value)
    if found not in (0, 1):
        raise ConfigError(f"{name}={shown(value)}: allowed are true and false")
    return bool(found)


def text(name: str, value: Any) -> str:
    """A text of valid Unicode: lone surrogates become U+FFFD. Bytes are read as UTF-8."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{name}={shown(value)}: allowed are bytes in UTF-8") from None
    if not isinstance(value, str):
        raise ConfigError(f"{name}={shown(value)}: allowed is text")
    return well_formed(value)


def error_text(value: Any) -> str | None:
    """Why an action failed, at most `MAX_ERROR` characters; None for what is false in Python."""
    try:
        if not value:
            return None
    except Exception:  # an array of several values is neither true nor false
        pass
    try:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    except Exception:
        text = ""
    return well_formed(text or type(value).__name__)[:MAX_ERROR]


def observation(read: Any) -> TextObservation:
    """A copy of an observation that has all fields."""
    if not isinstance(read, Mapping) or set(read) != set(FIELDS):
        raise ConfigError(
            f"observation={shown(read)}: allowed is a dict with the keys {', '.join(FIELDS)}"
        )
    return TextObservation(**{key: text(f"observation[{key!r}]", read[key]) for key in FIELDS})


class Answer(NamedTuple):
    """What `TextVectorEnv.step` returned for n environments, each field of length n."""

    observations: list[TextObservation]
    rewards: list[float]
    terminated: list[bool]
    truncated: list[bool]
    final_obs: list[TextObservation | None]
    errors: list[str | None]
    cached: list[bool]


def answer(returned: Any, count: int) -> Answer:
    """The five values of `TextVectorEnv.step` or `step_part` for `count` environments."""
    observations, rewards, terminated, truncated, infos = returned
    fields = {"observations": observations, "rewards": rewards, "terminations": terminated}
    fields |= {"truncations": truncated}
    for key in ("final_obs", "error", "cached"):
        if key not in infos:
            raise ConfigError(f"infos lacks {key}; allowed are final_obs, error, attempt, cached")
        fields[f"infos[{key!r}]"] = infos[key]
    for name, values in fields.items():
        if len(values) != count:
            raise ConfigError(f"{len(values)} {name}: allowed are {count}, one per environment")
    return Answer(
        [observation(read) for read in observations],
        [reward(paid) for paid in rewards],
        [flag("terminated", value) for value in terminated],
        [flag("truncated", value) for value in truncated],
        [None if final is None else observation(final) for final in infos["final_obs"]],
        [error_text(error) for error in infos["error"]],
        [flag("cached", value) for value in infos["cached"]],
    )


def observations(read: Sequence[Any], count: int) -> list[TextObservation]:
    """The first observations of `count` environments."""
    if len(read) != count:
        raise ConfigError(f"{len(read)} observations: allowed are {count}, one per environment")
    return [observation(one) for one in read]


def well_formed(value: str) -> str:
    """A `str` of valid Unicode: surrogate pairs become their character, lone ones U+FFFD."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shown(value: Any) -> str:
    """A value in one short line."""
    try:
        return one_line(repr(value), 80)
    except Exception:  # a faulty __repr__
        return type(value).__name__
