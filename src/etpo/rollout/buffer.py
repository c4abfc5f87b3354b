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
        fill: yields pairs of a batch (`TokenBatch` or `Actions`) and its number of passes. The rows
            of a batch are those of the iterations one after another, the fresh ones first.
        shuffle: returns the generator that shuffles the iteration.
        epochs: passes of all batches.
    """

    def __init__(
        self,
        fill: Callable[[], Iterator[tuple[Any, int]]],
        shuffle: Callable[[], torch.Generator],
        batches_per_epoch: int,
        minibatch_size: int,
        epochs: int,
    ) -> None:
        self.fill, self.shuffle = fill, shuffle
        self.batches_per_epoch = batches_per_epoch
        self.minibatch_size = minibatch_size
        self.epochs = epochs

    def __len__(self) -> int:
        return self.epochs * self.batches_per_epoch

    def __iter__(self) -> Iterator[Any]:
        generator = self.shuffle()
        for batch, epochs in self.fill():
            minibatches = self.rows(len(batch[0]), epochs, generator)
            for number, rows in enumerate(minibatches, start=1):
                minibatch = batch.select(rows)
                if number == len(minibatches):
                    del batch  # free it before the next iteration fills the buffer
                yield minibatch

    def rows(self, count: int, epochs: int, generator: torch.Generator) -> list[torch.Tensor]:
        """Return the rows of each minibatch of `epochs` passes over `count` actions."""
        size = self.batches_per_epoch * self.minibatch_size
        starts = range(0, count, size)  # of the iterations
        orders = [
            [torch.randperm(size, generator=generator) + start for _ in range(epochs)]
            for start in starts
        ]
        parts = [torch.split(torch.cat(order), self.minibatch_size) for order in orders]
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]
