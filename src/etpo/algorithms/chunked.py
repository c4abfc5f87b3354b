"""Functions of distributions over the vocabulary, some tokens at a time.

A function of per-token inputs [..., D] that goes through the vocabulary, [..., V], and ends in
numbers per token is evaluated here on one chunk of tokens after the other, so that no more than a
chunk's [chunk, V] is held, in the backward pass too. What it computes is not this module's matter:
the function is the same whether all tokens come at once or a chunk of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

PerToken = Callable[..., tuple[Tensor, ...]]


def in_chunks(function: PerToken, chunk: int | None, *per_token: Tensor) -> tuple[Tensor, ...]:
    """`function(*per_token)`, `chunk` >= 1 tokens at a time; None: all at once.

    per_token: [B, L, ...] each. `function` maps them, or [n, ...] of n of the B L tokens, to a
    tuple of tensors with the same leading dimensions, token by token. Gradients reach the inputs
    and whatever else it reads; for them it is evaluated again in the backward pass.
    """
    if chunk is None:
        return function(*per_token)

    def evaluate(*part: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return function(*part)
        outputs: tuple[Tensor, ...] = checkpoint(
            function, *part, use_reentrant=False, preserve_rng_state=False
        )
        return outputs

    return joined([evaluate(*part) for part in split(per_token, chunk)], per_token[0].shape[:2])


def reduce_in_chunks(
    function: PerToken,
    reduce: Callable[..., Tensor],
    chunk: int | None,
    *per_token: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`reduce(*outputs)` [], and the outputs without gradient, of `function` as in `in_chunks`.

    reduce: a linear function of the outputs, [B, L] each, so that what each of them counts is known
    beforehand: gradients are taken along with the values, and nothing is evaluated twice. They
    reach `per_token` and `parameters`, the trained leaves that `function` reads besides; of each
    one gradient is held until the backward pass.
    """
    if chunk is None or not torch.is_grad_enabled():
        outputs = in_chunks(function, chunk, *per_token)
        return reduce(*outputs), tuple(output.detach() for output in outputs)
    shape = per_token[0].shape[:2]
    wanted = [place for place, tensor in enumerate(per_token) if tensor.requires_grad]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    counts: list[tuple[Tensor, ...]] = []  # per chunk, what its outputs count, [n] each
    parts: list[tuple[Tensor, ...]] = []
    gradients: list[tuple[Tensor, ...]] = []
    for number, part in enumerate(split([tensor.detach() for tensor in per_token], chunk)):
        leaves = [part[place].requires_grad_() for place in wanted]
        with WeightGradients(parameters, totals):
            outputs = function(*part)
        counts = counts or split(coefficients(reduce, outputs, shape), chunk)
        found = gradients_of(outputs, counts[number], [*leaves, *parameters])
        for total, gradient in zip(totals, found[len(leaves) :], strict=True):
            if gradient is not None:
                total += gradient
        pairs = zip(leaves, found, strict=False)
        gradients.append(tuple(torch.zeros_like(x) if g is None else g for x, g in pairs))
        parts.append(tuple(output.detach() for output in outputs))
        del outputs, found
    whole = joined(parts, shape)
    value: Tensor = WithGradients.apply(  # type: ignore[no-untyped-call]
        reduce(*whole),
        [*joined(gradients, shape), *totals],
        *(per_token[place] for place in wanted),
        *parameters,
    )
    return value, whole


def split(per_token: Sequence[Tensor], chunk: int) -> list[tuple[Tensor, ...]]:
    """[B, L, ...] each -> chunks of [n, ...] each, at least one."""
    chunks = (torch.split(tensor.flatten(0, 1), chunk) for tensor in per_token)
    return list(zip(*chunks, strict=True))


def joined(parts: Sequence[tuple[Tensor, ...]], shape: torch.Size) -> tuple[Tensor, ...]:
    """Chunks of [n, ...] each -> [B, L, ...] each; `shape` is (B, L)."""
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return tuple(column.view(shape + column.shape[1:]) for column in columns)


def coefficients(
    reduce: Callable[..., Tensor], outputs: Sequence[Tensor], shape: torch.Size
) -> tuple[Tensor, ...]:
    """What every token's outputs count in `reduce`: [B, L] each."""
    zeros = [output.new_zeros(shape, requires_grad=True) for output in outputs]
    return torch.autograd.grad(reduce(*zeros), zeros, allow_unused=True, materialize_grads=True)


def gradients_of(
    outputs: Sequence[Tensor], counts: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of the sum of outputs times counts, [n] each, with respect to `inputs`."""
    pairs = [(o, c) for o, c in zip(outputs, counts, strict=True) if o.requires_grad]
    kept, counted = zip(*pairs, strict=True)
    return torch.autograd.grad(kept, inputs, counted, allow_unused=True)


class WeightGradients(TorchFunctionMode):
    """Linear layers in it add their weights' gradients to `totals`; no other copy is held.

    parameters: the weights that this concerns, [V, D]; totals: of their shapes.
    """

    def __init__(self, parameters: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        super().__init__()
        pairs = zip(parameters, totals, strict=True)
        self.totals = {id(parameter): total for parameter, total in pairs}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (
            function is not F.linear
            or not torch.is_grad_enabled()
            or id(args[1]) not in self.totals
        ):
            return function(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        total = self.totals[id(weight)]
        output: Tensor = LinearInto.apply(x, weight, total)  # type: ignore[no-untyped-call]
        return output if bias is None else output + bias


class LinearInto(torch.autograd.Function):
    """x W^T, [n, D] and [V, D] -> [n, V], whose gradient of W is added to `total`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if upstream.dtype == x.dtype == ctx.total.dtype:
            ctx.total.addmm_(upstream.T, x)
        else:  # mixed precision
            ctx.total += upstream.T @ x.to(upstream.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (upstream @ weight.to(upstream.dtype)).to(x.dtype), None, None


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
