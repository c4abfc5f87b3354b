"""The command line: overrides as Hydra reads them, `null` for a group, quotes."""

import shlex
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from etpo.errors import ConfigError

# The option that stands for GROUP=null; None: no option at all, as by default.
NULL_OPTIONS = {
    "callbacks": "none",
    "debug": None,
    "experiment": None,
    "logger": "csv",
    "sweep": None,
}


def override(key: str, text: str) -> str:
    """`KEY=VALUE` that Hydra reads as this very text."""
    return f"{key}={hydra_value(text)}"


def shell_word(key: str, text: str) -> str:
    """`override` to be pasted into a shell."""
    return shlex.quote(override(key, text))


def hydra_value(text: str) -> str:
    """`text`, in quotes where Hydra would read something else without them."""
    if not set(text) & set("$\\"):
        try:
            value = OverridesParser.create().parse_override(f"key={text}").value()
        except HydraException:
            value = None
        if isinstance(value, str) and value == text:
            return text
    quote = Quote.single if '"' in text else Quote.double
    quoted: str = QuotedString(text.replace("${", "\\${"), quote).with_quotes()
    return quoted


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Hydra's flags and the overrides.

    Raises ConfigError for an override that Hydra cannot read, with the quotes that it needs.
    """
    # without a value, `--info` would take the override after it for one
    following = [*arguments[1:], "="]
    arguments = [
        "--info=all" if a in ("-i", "--info") and "=" in after else a
        for a, after in zip(arguments, following, strict=False)
    ]
    multirun = [a for a in arguments if a in ("-m", "--multirun")]
    # argparse refuses overrides on both sides of a flag
    arguments = [
        *(["--multirun"] if multirun else []),
        *(a for a in arguments if a not in multirun),
    ]
    given = get_args_parser().parse_args(arguments).overrides
    left = list(given)
    flags = []
    for argument in arguments:
        if argument in left:
            left.remove(argument)
        else:
            flags.append(argument)
    return flags, [parse(argument) for argument in given]


def parse(argument: str) -> Override:
    """One override; ConfigError where Hydra cannot read it."""
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


def text_of(given: Override) -> str | None:
    """The value of an override as text, interpolations resolved; None for null and for `~key`."""
    if given.type == OverrideType.DEL:
        return None
    value = OmegaConf.create({"value": given.value()}).value
    return None if value is None else str(value)


def without_null_groups(overrides: list[Override], groups: Sequence[str]) -> list[Override]:
    """`overrides` with the option that `NULL_OPTIONS` names for `GROUP=null`.

    groups: all config groups. Raises ConfigError for a group that needs an option.
    """
    kept: list[Override] = []
    for given in overrides:
        group = given.key_or_group
        null = given.type != OverrideType.DEL and not given.is_sweep_override()
        if group not in groups or not null or given.value() is not None:
            kept.append(given)
            continue
        if group not in NULL_OPTIONS:
            raise ConfigError(f"{group}=null: this group needs an option: {group}=NAME")
        kept = [other for other in kept if other.key_or_group != group]
        option = NULL_OPTIONS[group]
        if option is not None:
            kept.append(parse(f"{group}={option}"))
    return kept
