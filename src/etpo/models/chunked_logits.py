"""Functions of distributions over the vocabulary, `chunk` tokens at a time.

A function of per-token inputs [..., D] that goes through the vocabulary, [..., V], and returns
numbers per token is evaluated on one chunk of tokens after the other. At most one chunk's
[chunk, V] is held, in the backward pass too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

PerToken = Callable[..., tuple[Tensor, ...]]


def in_chunks(function: PerToken, chunk: int, *per_token: Tensor) -> tuple[Tensor, ...]:
    """Compute `function(*per_token)`, `chunk` >= 1 tokens at a time.

    per_token: [B, L, ...] each. `function` maps them, or [n, ...] of n of the B L tokens, to a
    tuple of tensors with the same leading dimensions, token by token. With more than one chunk it
    is evaluated again in the backward pass.
    """
    if per_token[0].shape[:2].numel() <= chunk:
        return function(*per_token)
    parts = [
        checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)
        for part in split(per_token, chunk)
    ]
    return join(parts, per_token[0].shape[:2])


def reduce_in_chunks(
    function: PerToken,
    reduce: Callable[..., Tensor],
    chunk: int,
    *per_token: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return `reduce(*outputs)` [], and the detached outputs, of `function` as in `in_chunks`.

    `reduce` must be linear in the outputs [B, L]. Its gradient is then a constant, so that each
    chunk's backward runs right after its forward and nothing is evaluated twice. One gradient of
    each of `per_token` and of `parameters`, the trained tensors that `function` reads, is held
    until the backward pass.
    """
    shape = per_token[0].shape[:2]
    if shape.numel() <= chunk or not torch.is_grad_enabled():
        outputs = in_chunks(function, chunk, *per_token)
        return reduce(*outputs), tuple(output.detach() for output in outputs)
    trained = [place for place, tensor in enumerate(per_token) if tensor.requires_grad]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    weights: list[tuple[Tensor, ...]] = []  # d reduce / d outputs, by chunk
    parts, gradients = [], []
    for number, part in enumerate(split([tensor.detach() for tensor in per_token], chunk)):
        leaves = [part[place].requires_grad_() for place in trained]
        found = function(*part)
        if not weights:
            weights = split(gradient_of(reduce, found, shape), chunk)
        pairs = zip(found, weights[number], strict=True)
        kept, upstream = zip(*((o, w) for o, w in pairs if o.requires_grad), strict=True)
        own = torch.autograd.grad(kept, [*leaves, *parameters], upstream, allow_unused=True)
        for total, gradient in zip(totals, own[len(leaves) :], strict=True):
            if gradient is not None:
                total += gradient
        pairs = zip(leaves, own, strict=False)
        gradients.append(tuple(torch.zeros_like(x) if g is None else g for x, g in pairs))
        parts.append(tuple(output.detach() for output in found))
        del found, kept, own
    outputs = join(parts, shape)
    inputs = [*(per_token[place] for place in trained), *parameters]
    value: Tensor = WithGradients.apply(  # type: ignore[no-untyped-call]
        reduce(*outputs), [*join(gradients, shape), *totals], *inputs
    )
    return value, outputs


def gradient_of(
    reduce: Callable[..., Tensor], outputs: tuple[Tensor, ...], shape: torch.Size
) -> tuple[Tensor, ...]:
    """Return the constant gradients [B, L] of a linear `reduce`; `outputs` give their dtypes."""
    zeros = [output.new_zeros(shape, requires_grad=True) for output in outputs]
    return torch.autograd.grad(reduce(*zeros), zeros, allow_unused=True, materialize_grads=True)


def split(per_token: Sequence[Tensor], chunk: int) -> list[tuple[Tensor, ...]]:
    """Split [B, L, ...] each into chunks of [n, ...] each, at least one."""
    chunks = (torch.split(tensor.flatten(0, 1), chunk) for tensor in per_token)
    return list(zip(*chunks, strict=True))


def join(parts: Sequence[tuple[Tensor, ...]], shape: torch.Size) -> tuple[Tensor, ...]:
    """Join chunks of [n, ...] each to [B, L, ...] each; `shape` is (B, L)."""
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return tuple(column.view(shape + column.shape[1:]) for column in columns)


class WithGradients(torch.autograd.Function):
    """A value [] whose gradients with respect to `inputs` are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(upstream * gradient for gradient in ctx.saved_tensors)
