"""Resuming: the checkpoint, its run's folder, and what may change between two sessions of a run."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from etpo.errors import ConfigError
from etpo.overrides import override, split_arguments, text_of, without

# Keys that identify a run; all others may change when it is resumed.
FIXED = (
    *("seed", "algorithm._target_", "critic._target_", "environment._target_"),
    *("algorithm.unit", "algorithm.token_discount", "algorithm.baseline"),
    *("model._target_", "model.name_or_path", "model.lora", "model.init_seed"),
    "model.quantization",
)


class CheckpointInConfig(BaseException):
    """A config file sets `ckpt_path`: the command must run again with it as an override."""

    def __init__(self, ckpt_path: str) -> None:
        super().__init__(ckpt_path)
        self.override = override("ckpt_path", ckpt_path)


def checkpoint_file(ckpt_path: object) -> Path:
    """Return the absolute path of a checkpoint file, or of last.ckpt in a folder or run folder.

    Raises ConfigError if it does not exist.
    """
    text = str(ckpt_path)
    paths = [Path(form).expanduser().absolute() for form in (text, text.strip())]
    for file in (p / below for p in paths for below in ("", "last.ckpt", "checkpoints/last.ckpt")):
        if file.is_file():
            return file
    folder = any(path.is_dir() for path in paths)
    found = "no checkpoints/last.ckpt in this folder" if folder else "no such file"
    raise ConfigError(f"ckpt_path={text}: {found}; allowed is a checkpoint")


def run_folder(file: Path) -> Path | None:
    """Return the folder of the run that wrote a checkpoint; None if the file was moved."""
    folders = (path.parent.parent for path in (file.absolute(), file.resolve()))
    return next((f for f in folders if (f / ".hydra" / "overrides.yaml").is_file()), None)


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line of a resumed run: saved overrides, then new ones, in its folder.

    `ckpt_path` becomes absolute. Without it, or with a checkpoint outside a run folder, only the
    order of flags changes. Raises ConfigError if the checkpoint does not exist or the overrides do
    not fit the run.
    """
    flags, overrides = split_arguments(arguments)
    given = next((o for o in reversed(overrides) if o.key_or_group == "ckpt_path"), None)
    others = without(overrides, "ckpt_path")
    lines = [o.input_line for o in others]
    sweep = given is not None and given.is_sweep_override()
    path = None if given is None or sweep else text_of(given)
    if (sweep or path) and {"-m", "--multirun"} & set(flags):
        raise ConfigError(
            "ckpt_path: allowed with --multirun is null; every run of a study resumes from its own "
            "checkpoint"
        )
    if given is None:
        return [*flags, *lines]
    if not path:
        return [*flags, *lines, given.input_line if sweep else "ckpt_path=null"]
    file = checkpoint_file(path)
    folder = run_folder(file)
    if folder is not None:
        lines = resumed_overrides(folder, others)
    return [*flags, *lines, override("ckpt_path", str(file))]


def resumed_overrides(folder: Path, given: list[Override]) -> list[str]:
    """Merge new overrides into the saved ones of the run in `folder`, and keep its schedules."""
    for run_dir in (o for o in given if o.key_or_group == "hydra.run.dir"):
        if Path(text_of(run_dir) or "").expanduser().resolve() != folder.resolve():
            raise ConfigError(
                f"{run_dir.input_line}: a resumed run continues in its own folder; allowed is "
                f"{folder}, or no hydra.run.dir"
            )
    given = without(given, "hydra.run.dir")
    lines = OmegaConf.load(folder / ".hydra" / "overrides.yaml")
    saved = without(split_arguments(lines)[1], "ckpt_path")
    merged = merge_overrides(saved, given)
    config = folder / ".hydra" / "config.yaml"
    if config.is_file() and not any(o.key_or_group == "schedule_iters" for o in [*saved, *given]):
        iterations = OmegaConf.select(OmegaConf.load(config), "schedule_iters")
        if iterations is not None:  # a run of etpo-train
            merged.append(f"schedule_iters={iterations}")
    return [*merged, override("hydra.run.dir", str(folder))]


def merge_overrides(saved: list[Override], new: list[Override]) -> list[str]:
    """Return both lists, where a new override replaces a saved one of the same key."""
    saved_by_key = {o.key_or_group: o for o in saved}
    lines = []
    for given in new:
        before, line = saved_by_key.get(given.key_or_group), given.input_line
        same = before is None or before.value() == given.value()
        if given.key_or_group == "experiment" and not same:
            raise ConfigError(
                f"{line}: the run was started with {before.input_line}; allowed is the same, or no "
                "experiment="
            )
        added = before is not None and before.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
        lines.append(f"++{line}" if added and given.type == OverrideType.CHANGE else line)
    replaced = {o.key_or_group for o in new}
    kept = [o.input_line for o in saved if o.key_or_group not in replaced]
    return [*kept, *dict.fromkeys(lines)]


def check_same_run(folder: Path, cfg: DictConfig) -> None:
    """Raise ConfigError if a key of `FIXED` differs from the run that was started in `folder`."""
    config = folder / ".hydra" / "config.yaml"
    if not config.is_file():
        return
    saved = OmegaConf.load(config)
    for key in FIXED:
        old, new = OmegaConf.select(saved, key), OmegaConf.select(cfg, key)
        if old != new:
            raise ConfigError(
                f"{key}={new}: the run was started with {key}={old}; allowed is the same, or a new "
                "run without ckpt_path"
            )
