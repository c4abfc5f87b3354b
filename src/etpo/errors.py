"""Exceptions that end a command with one line, without a traceback, and range checks."""

import re
import textwrap

MAX_SEED = 2**32 - 1  # of NumPy and Lightning


class ConfigError(ValueError):
    """Bad input: one line that names the config key and the allowed values; exit status 2."""


class EnvironmentFailure(ConfigError):
    """An exception raised by an environment; HYDRA_FULL_ERROR=1 shows its traceback instead."""


class UnknownMetric(ConfigError):
    """`optimized_metric` names a metric that no iteration logs."""


class OutputError(RuntimeError):
    """A file that cannot be written: one line with its path and the reason; exit status 1."""


def first_cause(error: BaseException) -> BaseException:
    """Return the ConfigError or OutputError that led to `error`, else its first cause."""
    while not isinstance(error, ConfigError | OutputError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def error_line(error: BaseException) -> str:
    """Return a ConfigError in one line, of other exceptions OmegaConf's key and the first line."""
    cause = first_cause(error)
    if isinstance(cause, ConfigError | OutputError):
        return " ".join(str(cause).splitlines())
    key = re.search(r"full_key: (\S+)", str(error))
    line = (str(cause).splitlines() or [type(cause).__name__])[0]
    return f"{key[1]}: {line}" if key else line


def one_line(text: str, limit: int = 300) -> str:
    """Return at most `limit` characters of a text on one line, without control characters."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = line[: limit - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in line)


def described(error: BaseException) -> str:
    """Return type and message of an exception in one line."""
    return f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")


def reason(error: BaseException, length: int = 300) -> str:
    """Return the first whole sentences, about `length` characters, of a library's error."""
    text = one_line(str(error), 10**6) or type(error).__name__
    ends = [match.start() for match in re.finditer(r"(?<=[.!?;]) (?=[A-Z`])", text)] + [len(text)]
    end = max([ends[0], *(end for end in ends if end < length)])
    return textwrap.shorten(text[:end].rstrip("."), 2 * length, placeholder=" ...")


def check_range(key: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Raise ConfigError unless low <= value <= high (low < value if `above`) and no bool."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low):
        bound = f"above {low:g}" if above else f"{low:g} or more"
        limit = "" if high == float("inf") else f" and at most {high:g}"
        raise ConfigError(f"{key}={value}: allowed is a number, {bound}{limit}")


def check_integer(key: str, value: object, low: int, high: int | None = None) -> None:
    """Raise ConfigError unless `value` is an int, no bool, and low <= value <= high."""
    if type(value) is not int or value < low or (high is not None and value > high):
        span = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{key}={value}: allowed is {span}, an integer")
