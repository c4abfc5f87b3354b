"""The exceptions that end a command with one line, and the checks that several modules share."""

import re
import textwrap

MAX_SEED = 2**32 - 1  # of NumPy and Lightning


class ConfigError(ValueError):
    """A bad input: one line that names the config key and what is allowed.

    Entry points print the message and exit with status 2; no traceback is shown.
    """


class EnvironmentFailure(ConfigError):
    """An exception that an environment raised, in one line; its cause is that exception.

    With HYDRA_FULL_ERROR set an entry point shows the traceback instead.
    """


def one_line(text: str, limit: int = 300) -> str:
    """At most `limit` characters of a text, on one line and without control characters."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = line[: limit - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in line)


def described(error: BaseException) -> str:
    """Kind and text of an exception in one line."""
    return f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")


class UnknownMetric(ConfigError):
    """`optimized_metric` names a metric that no iteration logs: no run of a study could have it."""


class OutputError(RuntimeError):
    """A file that cannot be written: one line that names it and the reason.

    Entry points print the message and exit with status 1; no traceback is shown.
    """


def reason(error: BaseException, length: int = 300) -> str:
    """The message of a library's error on one line: whole sentences, about `length` characters."""
    text = one_line(str(error), 10**6) or type(error).__name__
    sentences = re.split(r"(?<=[.!?;]) (?=[A-Z`])", text)
    kept = sentences.pop(0)
    for sentence in sentences:
        if len(kept) + len(sentence) >= length:
            break
        kept += f" {sentence}"
    return textwrap.shorten(kept.rstrip("."), 2 * length, placeholder=" ...")


def check_range(key: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Raises ConfigError unless low <= value <= high (low < value where `above`); bool is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low):
        bound = f"above {low:g}" if above else f"{low:g} or more"
        limit = "" if high == float("inf") else f" and at most {high:g}"
        raise ConfigError(f"{key}={value}: allowed is a number, {bound}{limit}")


def check_integer(key: str, value: object, low: int, high: int | None = None) -> None:
    """Raises ConfigError unless `value` is an int, no bool, and low <= value <= high."""
    if type(value) is not int or value < low or (high is not None and value > high):
        span = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{key}={value}: allowed is {span}, an integer")
