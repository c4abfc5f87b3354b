"""Resuming: the checkpoint, its run folder, and what may change between two sessions of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from lightning import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from etpo.config import check_overrides, checkpoint_file, config_groups, run_folder
from etpo.errors import ConfigError
from etpo.overrides import override, split_arguments, text_of, without_null_groups

# What makes a run this run; all other keys act from the resumed iteration on.
FIXED = (
    "seed",
    "algorithm._target_",
    "critic._target_",
    "environment._target_",
    "model._target_",
    "model.name_or_path",
    "model.lora",
    "model.init_seed",
)
# Options of an optimizer that may change while its state is kept.
CHANGEABLE_OPTIONS = {
    *("params", "lr", "initial_lr", "betas", "eps", "weight_decay"),
    *("foreach", "fused", "capturable", "differentiable"),
}


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of a resumed run: the saved overrides, then the new ones, in its folder.

    All ways to write `ckpt_path` come out as one, with an absolute path. Without `ckpt_path`, or
    with a checkpoint that lies in no run folder, nothing else changes but `GROUP=null`.
    Raises ConfigError where there is no such checkpoint or the overrides do not fit the run.
    """
    flags, overrides = split_arguments(arguments)
    overrides = without_null_groups(overrides, config_groups())
    given = [o for o in overrides if o.key_or_group == "ckpt_path"]
    others = [o for o in overrides if o.key_or_group != "ckpt_path"]
    lines = [o.input_line for o in others]
    multirun = {"-m", "--multirun"} & set(flags)
    if given and multirun and (given[-1].is_sweep_override() or text_of(given[-1]) is not None):
        raise ConfigError(
            "ckpt_path: allowed with --multirun is null; every run of a study resumes from its own "
            "checkpoint"
        )
    path = text_of(given[-1]) if given else path_of_a_group(flags, others)
    if not path:
        nothing = ["ckpt_path=null"] if given else []
        return [*flags, *lines, *nothing]
    file = checkpoint_file(path)
    checkpoint = override("ckpt_path", str(file))
    folder = run_folder(file)
    if folder is None:
        return [*flags, *lines, checkpoint]
    for run_dir in (o for o in others if o.key_or_group == "hydra.run.dir"):
        if Path(text_of(run_dir) or "").expanduser().resolve() != folder.resolve():
            raise ConfigError(
                f"{run_dir.input_line}: a resumed run goes on in its own folder; allowed is "
                f"{folder}, or no hydra.run.dir"
            )
    others = [o for o in others if o.key_or_group != "hydra.run.dir"]
    saved = saved_overrides(folder)
    joined = merged(saved, others)
    if not any(o.key_or_group == "schedule_iters" for o in [*saved, *others]):
        joined += schedule_of(folder)
    return [*flags, *joined, checkpoint, override("hydra.run.dir", str(folder))]


def path_of_a_group(flags: list[str], overrides: list[Override]) -> str | None:
    """The `ckpt_path` that a chosen config file sets, as an experiment's."""
    chosen = {"experiment", "sweep", "debug"} & {o.key_or_group for o in overrides}
    if not chosen or {"-m", "--multirun"} & set(flags):
        return None
    cfg = check_overrides("train", [*flags, *(o.input_line for o in overrides)])
    return None if cfg is None or cfg.ckpt_path is None else str(cfg.ckpt_path)


def saved_overrides(folder: Path) -> list[Override]:
    """The overrides that a run was begun with, but for its checkpoint."""
    lines = [str(line) for line in OmegaConf.load(folder / ".hydra" / "overrides.yaml")]
    _, overrides = split_arguments(lines)
    return [o for o in overrides if o.key_or_group != "ckpt_path"]


def merged(saved: list[Override], new: list[Override]) -> list[str]:
    """Both, a new override in the place of a saved one of the same key."""
    begun = {o.key_or_group: o for o in saved}
    lines = []
    for given in new:
        before, line = begun.get(given.key_or_group), given.input_line
        experiment = before is not None and given.key_or_group == "experiment"
        if experiment and before.value() != given.value():
            raise ConfigError(
                f"{line}: the run was begun with {before.input_line}; allowed is the same, or no "
                "experiment="
            )
        added = before is not None and before.type in (OverrideType.ADD, OverrideType.FORCE_ADD)
        if added and given.type == OverrideType.CHANGE:
            line = f"++{line}"
        lines.append(line)
    replaced = {o.key_or_group for o in new}
    kept = [o.input_line for o in saved if o.key_or_group not in replaced]
    return [*kept, *dict.fromkeys(lines)]


def schedule_of(folder: Path) -> list[str]:
    """The override that keeps the length of a run's schedules; none where that is not known."""
    config = folder / ".hydra" / "config.yaml"
    if not config.is_file():
        return []
    saved = OmegaConf.load(config)
    iterations = OmegaConf.select(saved, "schedule_iters")
    if iterations is None:  # a run of an earlier version
        iterations = OmegaConf.select(saved, "trainer.max_epochs")
    return [] if iterations is None else [f"schedule_iters={iterations}"]


def check_unchanged(folder: Path, cfg: DictConfig) -> None:
    """Raises ConfigError where a key of `FIXED` differs from what the run was begun with."""
    config = folder / ".hydra" / "config.yaml"
    if not config.is_file():
        return
    before, now = (
        OmegaConf.to_container(part, resolve=False) for part in (OmegaConf.load(config), cfg)
    )
    for key in FIXED:
        old, new = value_at(before, key), value_at(now, key)
        if old != new:
            raise ConfigError(
                f"{key}={new}: the run was begun with {key}={old}; allowed is the same, or a new "
                "run without ckpt_path"
            )


def value_at(container: Any, key: str) -> Any:
    """The value at a dotted key of nested dictionaries, or None."""
    for part in key.split("."):
        container = container.get(part) if isinstance(container, dict) else None
    return container


def check_progress(content: dict[str, Any], ckpt_path: str, max_epochs: int) -> None:
    """Raises ConfigError where the checkpoint has more iterations than the run is to have."""
    done = content.get("epoch", -1) + 1
    if max_epochs < done:
        raise ConfigError(
            f"trainer.max_epochs={max_epochs}: {ckpt_path} has {done} iterations; allowed is "
            f"{done} or more"
        )


def check_optimizer(module: LightningModule, content: dict[str, Any]) -> None:
    """Raises ConfigError where the checkpoint's optimizer state is of another kind."""
    configured: Any = module.configure_optimizers()
    states = content.get("optimizer_states") or []
    if not configured or not states:
        return
    optimizer: Optimizer = configured["optimizer"]
    for group, saved in zip(optimizer.param_groups, states[0]["param_groups"], strict=False):
        own = {k: v for k, v in group.items() if k not in CHANGEABLE_OPTIONS}
        kept = {k: v for k, v in saved.items() if k not in CHANGEABLE_OPTIONS}
        name = next((k for k in own | kept if own.get(k, ...) != kept.get(k, ...)), None)
        if name is not None:
            raise ConfigError(
                f"algorithm.optimizer={type(optimizer).__name__}: the checkpoint holds the state "
                f"of another optimizer ({name}); allowed is the one that the run was begun with, "
                "with other learning rates, betas, eps or weight_decay"
            )
