"""Buffer of an iteration: fresh and replayed actions in shuffled minibatches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset


class OnPolicyBuffer(IterableDataset[Any]):
    """Collect new actions in every epoch and yield `epochs` passes of minibatches over them.

    Each minibatch has `minibatch_size` fresh actions and as many of every replayed iteration, so
    that the number of optimizer steps does not depend on the window.

    Args:
        fill: returns a batch (`TokenBatch` or `Actions`) and the generator that shuffles it. Its
            rows are those of the iterations one after another, the fresh ones first.
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
        size = self.batches_per_epoch * self.minibatch_size
        starts = range(0, len(batch[0]), size)  # of the iterations
        orders = [
            [torch.randperm(size, generator=generator) + start for _ in range(self.epochs)]
            for start in starts
        ]
        parts = [torch.cat(order).split(self.minibatch_size) for order in orders]
        minibatches = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        for number, rows in enumerate(minibatches, start=1):
            minibatch = batch.select(rows)
            if number == len(minibatches):
                del batch  # free it before the next iteration fills the buffer
            yield minibatch
