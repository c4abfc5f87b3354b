"""Composing a command line as a console script does, without running it."""

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from etpo.config import CONF
from etpo.overrides import split_arguments


def composed(config_name: str, arguments: Sequence[str]) -> DictConfig:
    """The configuration with `hydra`; of a multirun that of its first job."""
    flags, overrides = split_arguments(arguments)
    multirun = bool({"-m", "--multirun"} & set(flags))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()  # finds the options of a glob(...)
        lines = [o.input_line for o in overrides]
        parsed = OverridesParser.create(loader).parse_overrides(lines)
        lines = [first(o) if multirun and o.is_sweep_override() else o.input_line for o in parsed]
        if "--config-dir" in flags:
            folder = flags[flags.index("--config-dir") + 1]
            lines.append(f"hydra.searchpath=[file://{folder}]")
        return compose(config_name, lines, return_hydra_config=True)


def first(sweep: Override) -> str:
    """An override with the first value of its sweep."""
    interval = sweep.is_interval_sweep()
    value = sweep.value().start if interval else next(sweep.sweep_string_iterator())
    return f"{sweep.get_key_element()}={value}"
