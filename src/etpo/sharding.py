"""Weights in shards over all processes (PyTorch's FSDP2), and DeepSpeed where it is installed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from etpo.errors import ConfigError, check_integer


def deepspeed_strategy(stage: int = 2, **settings: Any) -> Strategy:
    """DeepSpeed's ZeRO: gradients (2) and the optimizer's moments (1, 2) in shards.

    settings: further arguments of `DeepSpeedStrategy`. Raises ConfigError without the package, and
    for stage 3, whose sharded weights could not be sampled from.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            'trainer=deepspeed: needs the package deepspeed: pip install -e ".[deepspeed]"; '
            "allowed without it are cpu, gpu, ddp, ddp_cpu, fsdp"
        )
    check_integer("trainer.strategy.stage", stage, 1, 2)
    return DeepSpeedStrategy(stage=stage, **settings)


class ShardedStrategy(ModelParallelStrategy):
    """Every process holds a shard of all weights, gradients and moments of the optimizer.

    The module applies `shard` in its `configure_model`. Checkpoints are single files with whole
    weights, as those of other strategies. settings: arguments of `ModelParallelStrategy`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            tensor_parallel_size=1, **({"save_distributed_checkpoint": False} | settings)
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, *modules: nn.Module) -> None:
        """Shards each module's weights; they are gathered together, and freed together.

        One unit per module: a backward pass reduces its gradients once, however often each process
        has called it. Raises ConfigError where two modules share weights.
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
    """Inside, every process has the whole weights, and calls of them wait for no other process.

    Nothing where no weights are sharded. All processes must enter and leave together.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()
