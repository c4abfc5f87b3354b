"""Gradient clipping, checkpoint contents and the learning rates of a resumed run."""

import warnings
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from etpo.errors import ConfigError


def clip_gradients(parameters: list[nn.Parameter], max_norm: float, iteration: int) -> Tensor:
    """Clip the norm of the gradients to `max_norm` and return it before clipping: [].

    Raises:
        ConfigError: the norm is not finite.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not torch.isfinite(norm):
        raise ConfigError(
            f"algorithm.policy_lr, algorithm.critic_lr: the gradient norm is {float(norm)} in "
            f"iteration {iteration}; allowed are finite gradients. The step was not taken; "
            "last.ckpt holds the previous iteration. Smaller learning rates or "
            "model.dtype=float32 may help"
        )
    return norm


def trained_state(module: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict of a checkpoint without frozen weights and duplicates.

    Frozen weights are loaded from `model.name_or_path` again. A checkpoint without optimizer states
    (for `etpo-evaluate` and `etpo-export`) holds the policy's weights only.
    """
    policy, state = module.policy, checkpoint["state_dict"]
    frozen = {id(p) for p in policy.parameters() if not p.requires_grad}
    dropped = {
        name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in frozen
    }
    if "optimizer_states" not in checkpoint:
        dropped |= {name for name in state if not name.startswith("policy.")}
    below = tuple(f"{name}." for name in dropped)  # scales of quantised weights
    state = {n: w for n, w in state.items() if n not in dropped and not n.startswith(below)}
    for name, weight in state.items():  # after a Polyak step of 1 the target equals the critic
        other = state.get(name.removeprefix("target_"))
        if other is not None and other is not weight and torch.equal(other, weight):
            state[name] = other
    return state


def apply_configured_options(trainer: Trainer, configured: Any) -> None:
    """Replace the restored options of optimizer and scheduler by the configured ones.

    The scheduler repeats the steps of the past iterations. With an unchanged configuration the
    learning rates are equal bit for bit.

    Args:
        configured: output of a fresh `configure_optimizers`.
    """
    fresh, scheduler = configured["optimizer"], configured.get("lr_scheduler")
    if scheduler is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(trainer.current_epoch):
                scheduler.step()
        for config in trainer.lr_scheduler_configs:
            config.scheduler.load_state_dict(scheduler.state_dict())
    for optimizer in trainer.optimizers:
        for group, options in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group |= {key: value for key, value in options.items() if key != "params"}
