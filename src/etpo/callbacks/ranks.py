"""Gather Python objects of all ranks."""

from typing import Any

import torch.distributed as dist


def gather(value: Any) -> list[Any]:
    """Return the picklable `value` of every rank, in rank order; must be called on all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
