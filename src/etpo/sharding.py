"""Sharded weights (PyTorch's FSDP2), and DeepSpeed if it is installed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from etpo.errors import ConfigError, check_integer


def deepspeed_strategy(stage: int = 2, **settings: Any) -> Strategy:
    """Return DeepSpeed's ZeRO: optimizer moments (1, 2) and gradients (2) in shards.

    settings: further arguments of `DeepSpeedStrategy`. Raises ConfigError without the package, and
    for stage 3, whose sharded weights cannot be sampled from.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            'trainer=deepspeed: needs the package deepspeed: pip install -e ".[deepspeed]"; '
            "allowed without it are cpu, gpu, ddp, ddp_cpu, fsdp"
        )
    check_integer("trainer.strategy.stage", stage, 1, 2)
    return DeepSpeedStrategy(stage=stage, **settings)


class ShardedStrategy(ModelParallelStrategy):
    """Shard weights, gradients and optimizer moments over all processes.

    The module applies `shard` in its `configure_model`. Checkpoints are single files with whole
    weights. settings: arguments of `ModelParallelStrategy`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            tensor_parallel_size=1, **({"save_distributed_checkpoint": False} | settings)
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, *modules: nn.Module) -> None:
        """Shard the weights of each module as one unit: a backward pass reduces gradients once.

        Raises ConfigError if two modules share weights.
        """
        weights = [id(weight) for module in modules for weight in module.parameters()]
        if len(weights) > len(set(weights)):
            raise ConfigError(
                "critic=lora: allowed with trainer=fsdp are critics that share no weights with the "
                "policy: full, frozen_trunk, lm_copy"
            )
        for module in modules:
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Give every process the whole weights; all processes must enter and leave together."""
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()
