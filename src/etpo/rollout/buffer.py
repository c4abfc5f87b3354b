"""The on-policy replay buffer: one iteration's annotated actions in shuffled minibatches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset


def by_length(batch: Any, groups: int) -> list[Any]:
    """At most `groups` parts of `batch`, its actions sorted by length, without common padding.

    batch: a NamedTuple of tensors whose first dimension is the action, with `prompt_mask` [B, P],
    padded on the left, and `action_mask` [B, L], padded on the right. Fields named prompt_* are
    [B, P], all others [B], [B, L] or [B, L, ...]. Parts differ in size where B does not divide.
    """
    order = batch.action_mask.sum(1).argsort(stable=True)
    parts = []
    for rows in order.chunk(groups):
        first = int(batch.prompt_mask[rows].any(0).int().argmax())
        length = int(batch.action_mask[rows].any(0).sum())
        fields = {}
        for name, field in batch._asdict().items():
            if name.startswith("prompt_"):
                fields[name] = field[rows, first:]
            else:
                fields[name] = field[rows] if field.ndim == 1 else field[rows, :length]
        parts.append(type(batch)(**fields))
    return parts


class OnPolicyBuffer(IterableDataset[Any]):
    """Fills itself anew whenever it is iterated, then yields `epochs` passes of minibatches.

    fill: returns (batch, generator): a NamedTuple of tensors whose first dimension is the action,
    and the generator that shuffles it.
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
            minibatch = type(batch)(*(field[rows.to(field.device)] for field in batch))
            if number == len(minibatches):
                del batch  # else it lies there until the next iteration is full
            yield minibatch
