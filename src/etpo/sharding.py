"""Shard weights over all processes with PyTorch's FSDP2, or use DeepSpeed if it is installed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from etpo.errors import ConfigError, check_integer


def deepspeed_strategy(stage: int = 2, **settings: Any) -> Strategy:
    """Return DeepSpeed's ZeRO: gradients (stage 2) and the optimizer's moments (1, 2) in shards.

    Raises ConfigError without the package, and for stage 3: sharded weights cannot be sampled from.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            'trainer=deepspeed: needs the package deepspeed: pip install -e ".[deepspeed]"; '
            "allowed without it are cpu, gpu, ddp, ddp_cpu, fsdp"
        )
    check_integer("trainer.strategy.stage", stage, 1, 2)
    return DeepSpeedStrategy(stage=stage, **settings)


class ShardedStrategy(ModelParallelStrategy):
    """Every process holds a shard of all weights, gradients and optimizer moments.

    The module calls `shard` in its `configure_model`. Checkpoints are single files with whole
    weights, as with other strategies.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **settings: Any) -> None:
        settings["save_distributed_checkpoint"] = save_distributed_checkpoint
        super().__init__(tensor_parallel_size=1, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, module: LightningModule) -> None:
        """Shard all weights of `module` as one FSDP unit, whose forward is the training step.

        A step may call any part of any model, any number of times on each process: it gathers the
        weights once, and its backward pass reduces gradients once.
        """
        if not isinstance(module, FSDPModule):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])
            register_fsdp_forward_method(module, "training_step")


@contextmanager
def full_parameters(module: nn.Module) -> Iterator[None]:
    """Gather sharded weights on every process, for calls that wait for no other process.

    All processes must enter and leave together.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


def configure_strategy(module: LightningModule) -> None:
    """Shard an algorithm under ShardedStrategy; raise ConfigError for what DeepSpeed cannot do."""
    strategy, precision = module.trainer.strategy, module.trainer.precision
    max_kl = module.settings.max_kl
    if isinstance(strategy, ShardedStrategy):
        strategy.shard(module)
    elif isinstance(strategy, DeepSpeedStrategy) and precision != "32-true":
        raise ConfigError(
            f"trainer.precision={precision}: allowed with trainer=deepspeed is 32-true, because "
            "DeepSpeed would round the buffer"
        )
    elif isinstance(strategy, DeepSpeedStrategy) and max_kl is not None:
        raise ConfigError(
            f"algorithm.max_kl={max_kl}: allowed with trainer=deepspeed is null, because DeepSpeed "
            "owns the gradients that the trust region removes"
        )
