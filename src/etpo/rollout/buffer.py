"""On-policy buffer: the actions of one iteration in shuffled minibatches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset


class OnPolicyBuffer(IterableDataset[Any]):
    """Collect new actions in every epoch and yield `epochs` passes of minibatches over them.

    Args:
        fill: returns a batch (`TokenBatch` or `Actions`) and the generator that shuffles it.
    """

    def __init__(
        self,
        fill: Callable[[], tuple[Any, torch.Generator]],
        batches_per_epoch: int,
        minibatch_size: int,
        epochs: int,
    ) -> None:
        self.fill = fill
        self.batches_per_epoch = batches_per_epoch
        self.minibatch_size = minibatch_size
        self.epochs = epochs

    def __len__(self) -> int:
        return self.epochs * self.batches_per_epoch

    def __iter__(self) -> Iterator[Any]:
        batch, generator = self.fill()
        order = [torch.randperm(len(batch[0]), generator=generator) for _ in range(self.epochs)]
        minibatches = [rows for each in order for rows in torch.split(each, self.minibatch_size)]
        for number, rows in enumerate(minibatches, start=1):
            minibatch = batch.select(rows)
            if number == len(minibatches):
                del batch  # free it before the next iteration fills the buffer
            yield minibatch
