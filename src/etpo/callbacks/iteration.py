"""What a callback can know of the iteration that just ended, over all ranks."""

from typing import Any

import torch.distributed as dist
from lightning import LightningModule, Trainer


def gather(value: Any) -> list[Any]:
    """The picklable `value` of every rank, in rank order; to be called on all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def iteration_metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """The iteration's metrics by name, in a callback's `on_train_epoch_end`, on all ranks.

    Lightning runs that hook before the module's own, where `rollout_metrics` are logged: they are
    averaged over ranks here, as the logged ones are.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    ranks = gather(pl_module.rollout_metrics)
    return metrics | {name: sum(rank[name] for rank in ranks) / len(ranks) for name in ranks[0]}
