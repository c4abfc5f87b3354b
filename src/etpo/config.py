"""Where the configuration lies, how it is checked, and how bad input is told."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from etpo.errors import ConfigError
from etpo.models.backbone import tiny_checkpoint

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"


def short_hash(*values: object) -> str:
    """Ten hexadecimal digits that name `values`."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:10]


OmegaConf.register_new_resolver("tiny_checkpoint", tiny_checkpoint, replace=True)
OmegaConf.register_new_resolver("short_hash", short_hash, replace=True)


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Prints a ConfigError, or one that Hydra wrapped, on one line of stderr; exits with 2."""
    try:
        yield
    except (ConfigError, InstantiationException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        sys.exit(2)


def check_overrides(config_name: str, arguments: Sequence[str]) -> None:
    """Raises ConfigError unless the overrides among `arguments` compose; sweeps by first value."""
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        single = [
            f"{o.get_key_element()}={next(o.sweep_string_iterator())}"
            if o.is_sweep_override()
            else o.input_line
            for o in parsed
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose(config_name, [o for o in single if not o.lstrip("+~").startswith("hydra")])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:3])


def check_config(cfg: DictConfig) -> None:
    """Raises ConfigError for a missing or impossible value that no constructor sees in time."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]}=??? needs a value: give {missing[0]}=...")
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed={cfg.seed}: allowed is an integer from 0 to 4294967295")
    if cfg.trainer.max_epochs < 1:
        raise ConfigError(f"trainer.max_epochs={cfg.trainer.max_epochs}: allowed is 1 or more")
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: no such file; allowed is a checkpoint")


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of a resumed run: the saved overrides, then the new ones, in its folder.

    Without `ckpt_path=`, or with a checkpoint that lies in no run folder, `arguments` unchanged.
    """
    paths = [a.partition("=")[2] for a in arguments if a.startswith("ckpt_path=")]
    if not paths or paths[-1] in ("", "null"):
        return list(arguments)
    folder = Path(paths[-1]).absolute().parents[1]
    saved = folder / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        return list(arguments)
    kept = [o for o in OmegaConf.load(saved) if not o.startswith("ckpt_path=")]
    added = [*arguments, f"hydra.run.dir={folder}"]
    return [*(o for o in kept if o not in added), *dict.fromkeys(added)]


def study_arguments(arguments: Sequence[str]) -> list[str]:
    """`arguments`, with the hash of a multirun's command line as its `study` if it names none."""
    multirun = {"-m", "--multirun"} & set(arguments)
    if not multirun or any(a.startswith("study=") for a in arguments):
        return list(arguments)
    return [*arguments, f"study={short_hash(*sorted(set(arguments) - multirun))}"]
