"""The folder of the configuration, checks of it, and the line that reports bad input."""

import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from etpo.errors import MAX_SEED, ConfigError, EnvironmentFailure, OutputError, check_integer
from etpo.models.policy import tiny_checkpoint
from etpo.overrides import hydra_value, split_arguments

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"


def short_hash(*values: object) -> str:
    """Ten hexadecimal digits that name `values`."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:10]


def environment_name(environment: DictConfig) -> str:
    """The data set, the game, the gymnasium id, or the class of an environment's configuration."""
    dataset = environment.get("dataset")
    if dataset == "csv" and environment.get("path"):
        return Path(environment.path).stem
    game = (environment.get("kwargs") or {}).get("game")
    # a gymnasium id may start with the module that registers it
    return dataset or game or str(environment.get("id") or class_name(environment)).split(":")[-1]


def model_name(name_or_path: str) -> str:
    """`tiny` for the embedded model, else the last part of a hub id or a folder."""
    return "tiny" if name_or_path == tiny_checkpoint() else Path(name_or_path).name


def class_name(part: DictConfig) -> str:
    """The name of the class that is the `_target_` of a part of the configuration."""
    return str(part._target_).rpartition(".")[2]


def run_name(algorithm: DictConfig, environment: DictConfig, model: DictConfig, seed: int) -> str:
    """What W&B calls a run."""
    names = class_name(algorithm).lower(), environment_name(environment)
    return " ".join([*names, model_name(model.name_or_path), f"seed {seed}"])


for resolver in (tiny_checkpoint, short_hash, environment_name, model_name, run_name):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Prints bad input on one line of stderr and exits with 2.

    That is a ConfigError, also one that Hydra wrapped, and, unless HYDRA_FULL_ERROR is set, what
    an environment, or else a constructor or OmegaConf, raises. After an OutputError the exit
    status is 1.
    """
    try:
        yield
    except (ConfigError, OutputError, InstantiationException, OmegaConfBaseException) as error:
        cause = first_cause(error)
        whole = isinstance(cause, ConfigError | OutputError)
        whole = whole and not isinstance(cause, EnvironmentFailure)
        if not whole and "HYDRA_FULL_ERROR" in os.environ:
            raise
        hint = "" if whole else " (HYDRA_FULL_ERROR=1 shows the traceback)"
        print(f"error: {error_line(error)}{hint}", file=sys.stderr)
        sys.exit(1 if isinstance(cause, OutputError) else 2)


def first_cause(error: BaseException) -> BaseException:
    """The ConfigError or OutputError that led to `error`, else its first cause."""
    while not isinstance(error, ConfigError | OutputError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def error_line(error: BaseException) -> str:
    """One line for a person: a ConfigError's text, else the first line, with OmegaConf's key."""
    cause = first_cause(error)
    if isinstance(cause, ConfigError | OutputError):
        return " ".join(str(cause).splitlines())
    key = re.search(r"full_key: (\S+)", str(error))
    line = (str(cause).splitlines() or [type(cause).__name__])[0]
    return f"{key[1]}: {line}" if key else line


def check_overrides(config_name: str, arguments: Sequence[str]) -> DictConfig | None:
    """What the overrides among `arguments` compose to, sweeps by their first value, and `hydra`.

    None where `arguments` name another configuration than the package's own or ask for the
    shell's completion. Raises ConfigError where they do not compose.
    """
    flags = get_args_parser().parse_args(list(arguments))
    if flags.config_path or flags.config_name or flags.shell_completion:
        return None
    multirun = flags.multirun or "hydra.mode=MULTIRUN" in flags.overrides
    split_arguments(arguments)  # refuses what Hydra cannot read
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()  # finds what a glob(...) means
            parsed = OverridesParser.create(loader).parse_overrides(flags.overrides)
            single = [
                _first(o) if multirun and o.is_sweep_override() else o.input_line for o in parsed
            ]
            if flags.config_dir:
                single.append(f"hydra.searchpath=[{hydra_value(searched(flags.config_dir))}]")
            cfg = compose(config_name, single, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    interval = next((o.input_line for o in parsed if o.is_interval_sweep()), None)
    if interval is not None and "BasicSweeper" in cfg.hydra.sweeper._target_:
        raise ConfigError(f"{interval}: allowed is a list, or an interval with hydra/sweeper=tpe")
    return cfg


def searched(config_dir: str) -> str:
    """A folder of configurations, as Hydra's search path names it; ConfigError where none is."""
    folder = Path(config_dir).absolute()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    return f"file://{folder}"


@functools.cache
def config_groups() -> tuple[str, ...]:
    """The names of all config groups, below others too, as `model/prompt`."""
    return tuple(str(p.relative_to(CONF)) for p in CONF.rglob("*") if p.is_dir())


def _first(sweep: Override) -> str:
    if sweep.is_hydra_override():
        raise ConfigError(f"{sweep.input_line}: allowed is one value, no sweep")
    interval = sweep.is_interval_sweep()
    value = sweep.value().start if interval else next(sweep.sweep_string_iterator())
    return f"{sweep.get_key_element()}={value}"


def _one_line(error: Exception) -> str:
    text = str(error).partition("Config search path:")[0]
    lines = [line.strip() for line in text.splitlines() if "See https://" not in line]
    override = f"{error.override}:" if isinstance(error, OverrideParseException) else ""
    return " ".join(filter(None, [override, *lines]))


def check_missing(cfg: DictConfig) -> None:
    """Raises ConfigError where a value is `???`."""
    try:
        OmegaConf.to_container(cfg, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key}=??? needs a value: give {key}=...") from error


def check_config(cfg: DictConfig) -> None:
    """Raises ConfigError for a missing or impossible value that no constructor sees in time."""
    check_missing(cfg)
    OmegaConf.to_container(cfg, resolve=True)  # raises for an interpolation of an unknown key
    if OmegaConf.select(cfg, "task.mode") is not None and "mode" not in cfg.environment:
        raise ConfigError(
            "algorithm=reflexion needs prompts that carry a memory, environment.mode=remember; "
            "allowed is environment=data_science"
        )
    check_integer("seed", cfg.seed, 0, MAX_SEED)
    check_integer("trainer.max_epochs", cfg.trainer.max_epochs, 1)
    check_trainer(cfg.trainer, cfg.algorithm.get("max_grad_norm"))
    if "critic" in cfg and "hidden_size" in cfg.critic:
        check_integer("critic.hidden_size", cfg.critic.hidden_size, 1)
    if cfg.ckpt_path is not None and "optimizer_states" not in load_checkpoint(cfg.ckpt_path):
        raise ConfigError(
            f"ckpt_path={cfg.ckpt_path}: it holds the policy's weights alone; allowed is the run's "
            "last.ckpt"
        )


def check_trainer(trainer: DictConfig, max_grad_norm: float | None) -> None:
    """Raises ConfigError for arguments of the Trainer that could not act here."""
    for key, allowed in (("gradient_clip_val", max_grad_norm), ("gradient_clip_algorithm", "norm")):
        if trainer.get(key) not in (None, allowed):
            raise ConfigError(
                f"trainer.{key}={trainer[key]}: allowed is null; the limit on gradient norms is "
                f"algorithm.max_grad_norm={max_grad_norm}"
            )
    if trainer.get("overfit_batches"):
        raise ConfigError(
            f"trainer.overfit_batches={trainer.overfit_batches}: allowed is 0, for every iteration "
            "samples fresh actions; trainer.limit_train_batches=1 takes one step with each"
        )


_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, UnpicklingError)


def checkpoint_file(ckpt_path: object) -> Path:
    """The absolute path of a checkpoint; of a folder, its `last.ckpt`, also in `checkpoints/`.

    Raises ConfigError where there is none.
    """
    text = str(ckpt_path)
    paths = [Path(form).expanduser().absolute() for form in (text, text.strip())]
    files = [p / below for p in paths for below in ("", "last.ckpt", "checkpoints/last.ckpt")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        folder = next((p for p in paths if p.is_dir()), None)
        found = "no such file" if folder is None else "no checkpoints/last.ckpt in this folder"
        raise ConfigError(f"ckpt_path={text}: {found}; allowed is a checkpoint")
    return file


def run_folder(file: Path) -> Path | None:
    """The folder of the run that wrote the checkpoint `file`; None where it lies in none."""
    folders = (path.parent.parent for path in (file.absolute(), file.resolve()))
    return next((f for f in folders if (f / ".hydra" / "overrides.yaml").is_file()), None)


def load_checkpoint(ckpt_path: str) -> dict[str, Any]:
    """The checkpoint's content, mapped from the file; ConfigError where it is no checkpoint."""
    path = checkpoint_file(ckpt_path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        content["state_dict"]
    except _UNREADABLE as error:
        raise ConfigError(f"ckpt_path={path}: allowed is a checkpoint of a run") from error
    return content


def study_arguments(arguments: Sequence[str]) -> list[str]:
    """A multirun's `arguments`, its flag first, with their hash as `study` if none is named.

    The launcher is no part of the hash: where cells run does not change what they are.
    Raises ConfigError where the overrides do not compose.
    """
    flags, overrides = split_arguments(arguments)
    rest = [given.input_line for given in overrides]
    cfg = check_overrides("train", [*flags, *rest])
    if {"-m", "--multirun"} & set(flags) and cfg is not None and cfg.study is None:
        named = {a for a in rest if not a.startswith(("hydra/launcher", "hydra.launcher"))}
        named |= set(flags) - {"-m", "--multirun"}
        rest.append(f"study={short_hash(*sorted(named))}")
    return [*flags, *rest]
