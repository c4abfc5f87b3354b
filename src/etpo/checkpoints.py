"""Checkpoints: atomic files, the saved configuration, and whether content fits a module."""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.optim import Optimizer
from yaml import YAMLError

from etpo.errors import ConfigError, described
from etpo.files import written
from etpo.models.base_weights import BASE_SAMPLE, same_weights
from etpo.resume import checkpoint_file, run_folder

UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, UnpicklingError)
# Options of an optimizer that may change while its state is kept.
CHANGEABLE_OPTIONS = {
    *("params", "lr", "initial_lr", "betas", "eps", "weight_decay"),
    *("foreach", "fused", "capturable", "differentiable"),
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write next to the target and rename, so that a stop at any time leaves a whole checkpoint.

    Lightning's way through the temporary folder can swallow a Ctrl-C and may copy between file
    systems. Raises OutputError if the file cannot be written.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str, storage_options: Any | None = None
    ) -> None:
        with written(Path(path)) as part, part.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch wraps what its file raises
                raise error.__context__ or error from None
            file.flush()
            os.fsync(file.fileno())


def load_checkpoint(ckpt_path: str) -> dict[str, Any]:
    """Return the content, mapped from the file. Raises ConfigError for other files."""
    path = checkpoint_file(ckpt_path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        content["state_dict"]
    except UNREADABLE as error:
        raise ConfigError(f"ckpt_path={path}: allowed is a checkpoint of a run") from error
    return content


def saved_config(ckpt_path: str, overrides: list[str]) -> DictConfig:
    """Return the configuration of the run that wrote `ckpt_path`, with `overrides`.

    `paths.output_dir` is the run's folder. Raises ConfigError if it cannot be read.
    """
    file = checkpoint_file(ckpt_path)
    folder = run_folder(file) or file.parent.parent
    config = folder / ".hydra" / "config.yaml"
    try:
        cfg = OmegaConf.load(config)
    except (OSError, ValueError, YAMLError) as error:
        reason = described(error)
        raise ConfigError(f"ckpt_path={ckpt_path}: {config} cannot be read: {reason}") from error
    OmegaConf.set_struct(cfg, True)
    try:
        cfg.merge_with_dotlist(overrides)
    except OmegaConfBaseException as error:
        raise ConfigError(f"overrides={overrides}: {str(error).splitlines()[0]}") from error
    cfg.paths.output_dir = str(folder)
    return cfg


def load_weights(module: nn.Module, state: dict[str, Tensor], ckpt_path: str) -> None:
    """Load the trained weights. Raises ConfigError if `state` belongs to another model."""
    check_base(module.state_dict(), state, ckpt_path)
    try:
        strange = module.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ConfigError(f"ckpt_path={ckpt_path}: its weights have other shapes") from error
    if strange:
        raise ConfigError(f"ckpt_path={ckpt_path}: the model has no weight {strange[0]}")


def check_base(own: dict[str, Tensor], saved: dict[str, Tensor], ckpt_path: str) -> None:
    """Raise ConfigError unless both states were trained from the same weights.

    The frozen weights are not in a checkpoint, but a sample of them is.
    """
    for name in own.keys() & saved.keys():
        if name.rpartition(".")[2] == BASE_SAMPLE and not same_weights(own[name], saved[name]):
            raise ConfigError(
                f"ckpt_path={ckpt_path}: model.name_or_path has other weights now than when the "
                "run was started; allowed are the same ones"
            )


def load_resumable(ckpt_path: str, max_epochs: int) -> dict[str, Any]:
    """Load a checkpoint. Raises ConfigError for weights alone or more iterations than the run."""
    content = load_checkpoint(ckpt_path)
    if "optimizer_states" not in content:
        raise ConfigError(
            f"ckpt_path={ckpt_path}: it holds the policy's weights alone; allowed is the run's "
            "last.ckpt"
        )
    done = content.get("epoch", -1) + 1
    if max_epochs < done:
        raise ConfigError(
            f"trainer.max_epochs={max_epochs}: {ckpt_path} has {done} iterations; allowed is "
            f"{done} or more"
        )
    return content


def saved_state(module: LightningModule, *, optimizer: bool) -> dict[str, Tensor]:
    """Return the weights that a checkpoint of `module` holds, with or without an optimizer."""
    content: dict[str, Any] = {"state_dict": module.state_dict(keep_vars=True)}
    content |= {"optimizer_states": []} if optimizer else {}
    module.on_save_checkpoint(content)  # leaves frozen weights out
    return content["state_dict"]


def check_fits(module: LightningModule, content: dict[str, Any], ckpt_path: str) -> None:
    """Raise ConfigError unless a checkpoint has the weights, shapes and optimizer of `module`."""
    states = saved_state(module, optimizer=True), content["state_dict"]
    own, saved = ({name: weight.shape for name, weight in state.items()} for state in states)
    name = next((n for n in saved | own if own.get(n) != saved.get(n)), None)
    if name is not None:
        raise ConfigError(
            f"ckpt_path={ckpt_path}: its weights do not fit the model ({name}); allowed are the "
            "model=, model.name_or_path=, model.lora= and critic= that it was trained with"
        )
    check_base(*states, ckpt_path)
    configured: Any = module.configure_optimizers()
    optimizers = content.get("optimizer_states")
    if not configured or not optimizers:
        return
    optimizer: Optimizer = configured["optimizer"]
    for group, old in zip(optimizer.param_groups, optimizers[0]["param_groups"], strict=False):
        options = (set(group) | set(old)) - CHANGEABLE_OPTIONS
        changed = {k for k in options if group.get(k, ...) != old.get(k, ...)}
        if changed:
            raise ConfigError(
                f"algorithm.optimizer={type(optimizer).__name__}: the checkpoint has the state of "
                f"another optimizer ({min(changed)}); allowed is the one that the run was started "
                "with, with other learning rates, betas, eps or weight_decay"
            )
