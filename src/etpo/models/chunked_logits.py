"""Evaluate functions of distributions over the vocabulary, `chunk` tokens at a time.

A function maps inputs of prefixes [N, D] over the vocabulary, [N, V], to numbers per prefix. It is
evaluated on one chunk of prefixes after the other. At most one chunk's [chunk, V] is held, in the
backward pass too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

PerPrefix = Callable[..., tuple[Tensor, ...]]
# by weight [V, D]: the tensor that stands for it in a chunk, and the sum of its gradients, if any
Sums = dict[Tensor, tuple[Tensor, list[Tensor]]]

_sums: ContextVar[Sums | None] = ContextVar("sums", default=None)


def in_chunks(function: PerPrefix, chunk: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Compute `function(*inputs)`, `chunk` >= 1 prefixes at a time.

    Args:
        function: Maps [n, ...] each of n of the N prefixes to a tuple of tensors [n, ...], prefix
            by prefix. With more than one chunk it is evaluated again in the backward pass.
        inputs: [N, ...] each.
    """
    if len(inputs[0]) <= chunk:
        return function(*inputs)
    function = summing_gradients({})(function)
    parts = [
        checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)
        for part in split(inputs, chunk)
    ]
    return join(parts)


def reduce_in_chunks(
    function: PerPrefix,
    reduce: Callable[..., Tensor],
    chunk: int,
    *inputs: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return `reduce(*outputs)` [], and the detached outputs, of `function` as in `in_chunks`.

    `reduce` must be linear in the outputs [N, ...]. Its gradient is then a constant, so that each
    chunk's backward runs right after its forward and nothing is evaluated twice. One gradient of
    each of `inputs` and of `parameters`, the trained tensors that `function` reads, is held until
    the backward pass.
    """
    size = len(inputs[0])
    if size <= chunk or not torch.is_grad_enabled():
        outputs = in_chunks(function, chunk, *inputs)
        return reduce(*outputs), tuple(output.detach() for output in outputs)
    sums: Sums = {parameter: (parameter, []) for parameter in parameters}
    function = summing_gradients(sums)(function)
    trained = [place for place, tensor in enumerate(inputs) if tensor.requires_grad]
    weights: list[tuple[Tensor, ...]] = []  # d reduce / d outputs, by chunk
    parts, gradients = [], []
    for number, part in enumerate(split([tensor.detach() for tensor in inputs], chunk)):
        leaves = [part[place].requires_grad_() for place in trained]
        outputs = function(*part)
        if not weights:
            shapes = [(size, *output.shape[1:]) for output in outputs]
            zeros = [
                output.new_zeros(shape, requires_grad=True)
                for output, shape in zip(outputs, shapes, strict=True)
            ]
            constant = torch.autograd.grad(reduce(*zeros), zeros, materialize_grads=True)
            weights = split(constant, chunk)
        gradients.append(backward(outputs, weights[number], leaves, sums))
        parts.append(tuple(output.detach() for output in outputs))
        del outputs
    outputs = join(parts)
    totals = [total[0] if total else torch.zeros_like(key) for key, (_, total) in sums.items()]
    value: Tensor = WithGradients.apply(  # type: ignore[no-untyped-call]
        reduce(*outputs),
        [*join(gradients), *totals],
        *(inputs[place] for place in trained),
        *parameters,
    )
    return value, outputs


def project_to_vocabulary(layer: nn.Module, x: Tensor, ids: Tensor | None = None) -> Tensor:
    """Compute `layer(x)` [..., V], or its columns `ids` [..., U].

    Over chunks, the gradient of a linear layer's weight is summed in place. Otherwise each chunk
    would add a second gradient of the weight's size, [V, D].
    """
    if ids is not None:
        if type(layer) is not nn.Linear:  # an adapter on the LM head
            return layer(x)[..., ids]
        bias = None if layer.bias is None else layer.bias[ids]
        return linear(x, layer.weight.index_select(0, ids), bias)
    sums = _sums.get()
    if sums is None or type(layer) is not nn.Linear or not torch.is_grad_enabled():
        return layer(x)
    weight = layer.weight
    if weight.requires_grad and weight not in sums:
        total: list[Tensor] = []
        sums[weight] = ReturnSum.apply(weight, total), total  # type: ignore[no-untyped-call]
    output = LinearIntoSum.apply(x, *sums.get(weight, (weight, [])))  # type: ignore[no-untyped-call]
    return output if layer.bias is None else output + layer.bias.to(output.dtype)


@contextmanager
def summing_gradients(sums: Sums) -> Iterator[None]:
    """Let linear layers over the vocabulary use `sums`; as a decorator, in every call."""
    token = _sums.set(sums)
    try:
        yield
    finally:
        _sums.reset(token)


def backward(
    outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], leaves: list[Tensor], sums: Sums
) -> tuple[Tensor, ...]:
    """Return gradients of `leaves` and add the gradients of the keys of `sums` to their sums."""
    trained = [i for i, output in enumerate(outputs) if output.requires_grad]
    kept, upstream = [outputs[i] for i in trained], [weights[i] for i in trained]
    found = torch.autograd.grad(kept, [*leaves, *sums], upstream, allow_unused=True)
    for (_, total), gradient in zip(sums.values(), found[len(leaves) :], strict=True):
        if gradient is not None:
            total[:] = [total[0].add_(gradient) if total else gradient]
    pairs = zip(leaves, found, strict=False)
    return tuple(torch.zeros_like(x) if gradient is None else gradient for x, gradient in pairs)


def split(inputs: Sequence[Tensor], chunk: int) -> list[tuple[Tensor, ...]]:
    """Split [N, ...] each into chunks of [n, ...] each, at least one."""
    return list(zip(*(torch.split(tensor, chunk) for tensor in inputs), strict=True))


def join(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Join chunks of [n, ...] each to [N, ...] each."""
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class LinearIntoSum(torch.autograd.Function):
    """x W^T, [n, D] and [V, D] -> [n, V]; adds the gradient of W to the sum `total` in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            into, rows = upstream.flatten(0, -2).T, x.flatten(0, -2).to(upstream.dtype)
            if not ctx.total:
                ctx.total.append((into @ rows).to(weight.dtype))
            elif upstream.dtype == weight.dtype:
                ctx.total[0].addmm_(into, rows)
            else:  # mixed precision
                ctx.total[0] += into @ rows
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (upstream @ weight.to(upstream.dtype)).to(x.dtype), None, None


class ReturnSum(torch.autograd.Function):
    """A weight whose gradient is the sum `total` that its layers have filled."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, total: list[Tensor]) -> Tensor:
        ctx.total = total
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, None]:
        return (ctx.total.pop() if ctx.total else None), None


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
