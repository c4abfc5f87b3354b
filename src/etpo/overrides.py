"""The command line: Hydra's overrides, `null` for a group, quotes."""

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from etpo.config import CONF
from etpo.errors import ConfigError

# Flags of Hydra that are followed by a value.
WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun"),
}
# Options for GROUP=null; None removes the override.
NULL_OPTIONS = {"callbacks": "none", "logger": "csv"} | dict.fromkeys(
    ("debug", "experiment", "sweep")
)


def override(key: str, text: str) -> str:
    """Return `KEY=VALUE` that Hydra reads as exactly this text, in quotes unless a plain path."""
    if "/" in text and re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return f"{key}={text}"
    quote = Quote.single if '"' in text else Quote.double
    quoted = QuotedString(text.replace("${", "\\${"), quote).with_quotes()
    return f"{key}={quoted}"


def shell_word(key: str, text: str) -> str:
    """Return `override` quoted for a shell."""
    return shlex.quote(override(key, text))


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Separate Hydra's flags, with their values, from the overrides, `GROUP=null` replaced.

    Raises ConfigError for an override that Hydra cannot parse.
    """
    flags: list[str] = []
    overrides: list[Override] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-i", "--info") and (not rest or "=" in rest[0]):
            flags.append("--info=all")  # argparse would read the override as its value
        elif argument in ("-i", "--info", *WITH_VALUE):
            flags += [argument, *rest[:1]]
            del rest[:1]
        elif argument.startswith("-"):
            flags.append(argument)
        else:
            overrides = replace_null(overrides, parse(argument))
    return flags, overrides


def parse(argument: str) -> Override:
    """Parse one override. Raises ConfigError with a quoted form if Hydra cannot."""
    try:
        return OverridesParser.create().parse_overrides([argument])[0]
    except HydraException as error:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: allowed is key=value") from error
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(
            f"{argument}: Hydra cannot read this value ({reason}); quote text with blanks or "
            f"special characters: {shell_word(key, text)}"
        ) from error


def replace_null(before: list[Override], given: Override) -> list[Override]:
    """Append an override, or the option of `NULL_OPTIONS` for `GROUP=null`.

    Raises ConfigError for a group that needs an option.
    """
    group = given.key_or_group
    null = given.type != OverrideType.DEL and not given.is_sweep_override()
    if not null or given.value() is not None or not (CONF / group).is_dir():
        return [*before, given]
    if group not in NULL_OPTIONS:
        raise ConfigError(f"{group}=null: this group needs an option: {group}=NAME")
    option = NULL_OPTIONS[group]
    others = without(before, group)
    return others if option is None else [*others, parse(f"{group}={option}")]


def without(overrides: Sequence[Override], key: str) -> list[Override]:
    """Return the overrides of other keys."""
    return [given for given in overrides if given.key_or_group != key]


def text_of(given: Override) -> str | None:
    """Return an override's value as text, interpolations resolved; None for null and `~key`."""
    if given.type == OverrideType.DEL:
        return None
    value = OmegaConf.create({"value": given.value()}).value
    return None if value is None else str(value)
