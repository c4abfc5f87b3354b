"""The on-policy replay buffer: one iteration's annotated actions in shuffled minibatches."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset


class OnPolicyBuffer(IterableDataset):
    """Fills itself anew whenever it is iterated, then yields `epochs` passes of minibatches.

    fill: returns (batch, generator): a NamedTuple of tensors whose first dimension is the action,
    and the generator that shuffles it.
    """

    def __init__(
        self,
        fill: Callable[[], tuple[NamedTuple, torch.Generator]],
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

    def __iter__(self) -> Iterator[NamedTuple]:
        batch, generator = self.fill()
        for _ in range(self.epochs):
            order = torch.randperm(len(batch[0]), generator=generator)
            for rows in order.split(self.minibatch_size):
                yield type(batch)(*(field[rows.to(field.device)] for field in batch))
