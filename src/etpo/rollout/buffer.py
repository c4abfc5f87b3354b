"""On-policy buffer: the actions of one iteration in shuffled minibatches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from etpo.rollout.types import TokenBatch


def select_rows(batch: Any, rows: Tensor) -> Any:
    """Index every tensor of a NamedTuple by `rows`; fields that are None stay None."""
    return type(batch)(*(x if x is None else x[rows.to(x.device)] for x in batch))


def split_by_length(batch: TokenBatch, parts: int) -> list[TokenBatch]:
    """Split actions by length into at most `parts` batches and drop the common padding.

    Sizes differ if the number of actions is not divisible by `parts`.
    """
    order = batch.action_mask.sum(1).argsort(stable=True)
    split = []
    for rows in order.chunk(parts):
        part = select_rows(batch, rows)
        first = int(part.prompt_mask.any(0).int().argmax())
        length = int(part.action_mask.any(0).sum())
        cropped = {
            name: x[:, first:] if name in ("prompt_ids", "prompt_mask") else x[:, :length]
            for name, x in part._asdict().items()
            if x is not None and x.ndim > 1
        }
        split.append(part._replace(**cropped))
    return split


def distinct_rows(batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
    """Return the distinct prompts with actions of a batch, and the index of each row in them.

    A trained policy repeats actions; what depends on prompt and action alone is computed once.
    """
    read = [batch.prompt_ids, batch.prompt_mask, batch.action_ids, batch.action_mask]
    _, index = torch.unique(torch.cat([x.long() for x in read], 1), dim=0, return_inverse=True)
    rows = torch.arange(len(index), device=index.device)
    first = rows[: int(index.max()) + 1].scatter_reduce(0, index, rows, "amin", include_self=False)
    return select_rows(batch, first), index


class OnPolicyBuffer(IterableDataset[Any]):
    """Collect new actions in every epoch and yield `epochs` passes of minibatches over them.

    Args:
        fill: returns a batch, a NamedTuple of tensors with one row per action, and the generator
            that shuffles it.
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
            minibatch = select_rows(batch, rows)
            if number == len(minibatches):
                del batch  # free it before the next iteration fills the buffer
            yield minibatch
