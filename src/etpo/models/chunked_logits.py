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

PerToken = Callable[..., tuple[Tensor, ...]]


def in_chunks(
    function: PerToken,
    chunk: int | None,
    *per_token: Tensor,
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """`function(*per_token)`, `chunk` >= 1 tokens at a time; None: all at once.

    per_token: [B, L, ...] each. `function` maps them, or [n, ...] of n of the B L tokens, to a
    tuple of tensors with the same leading dimensions, token by token. Gradients reach `per_token`
    and `parameters`, the trained leaves that `function` reads besides; for them it is evaluated
    again in the backward pass.
    """
    if chunk is None:
        return function(*per_token)
    outputs: tuple[Tensor, ...] = Recomputed.apply(  # type: ignore[no-untyped-call]
        function, chunk, len(per_token), *per_token, *parameters
    )
    return outputs


def reduce_in_chunks(
    function: PerToken,
    reduce: Callable[..., Tensor],
    chunk: int | None,
    *per_token: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`reduce(*outputs)` [], and the outputs without gradient, of `function` as in `in_chunks`.

    reduce: a linear function of the outputs, [B, L] each, so that what each of them counts is known
    beforehand: gradients are taken along with the values, and nothing is evaluated twice. One
    gradient of each of `per_token` and `parameters` is held until the backward pass.
    """
    if chunk is None or not torch.is_grad_enabled():
        outputs = in_chunks(function, chunk, *per_token)
        return reduce(*outputs), tuple(output.detach() for output in outputs)

    def counts(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        zeros = [x.new_zeros(per_token[0].shape[:2], requires_grad=True) for x in outputs]
        return torch.autograd.grad(reduce(*zeros), zeros, allow_unused=True, materialize_grads=True)

    outputs, gradients = with_gradients(function, chunk, per_token, parameters, counts)
    value: Tensor = WithGradients.apply(  # type: ignore[no-untyped-call]
        reduce(*outputs), gradients, *per_token, *parameters
    )
    return value, outputs


def with_gradients(
    function: PerToken,
    chunk: int,
    per_token: Sequence[Tensor],
    parameters: Sequence[Tensor],
    counts: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The outputs, and gradients of `per_token` and `parameters`; None where none is wanted.

    counts: what each token's outputs count, [B, L, ...] each, from those of the first chunk.
    """
    shape = per_token[0].shape[:2]
    wanted = [place for place, tensor in enumerate(per_token) if tensor.requires_grad]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    upstream: list[tuple[Tensor, ...]] = []
    parts: list[tuple[Tensor, ...]] = []
    found: list[tuple[Tensor, ...]] = []
    for number, part in enumerate(split([tensor.detach() for tensor in per_token], chunk)):
        leaves = [part[place].requires_grad_() for place in wanted]
        with torch.enable_grad(), WeightGradients(parameters, totals):
            outputs = function(*part)
        upstream = upstream or split(counts(outputs), chunk)
        own = gradients_of(outputs, upstream[number], [*leaves, *parameters])
        for total, gradient in zip(totals, own[len(leaves) :], strict=True):
            if gradient is not None:
                total += gradient
        pairs = zip(leaves, own, strict=False)
        found.append(tuple(torch.zeros_like(x) if g is None else g for x, g in pairs))
        parts.append(tuple(output.detach() for output in outputs))
        del outputs, own
    gradients: list[Tensor | None] = [None] * len(per_token)
    for place, gradient in zip(wanted, joined(found, shape), strict=True):
        gradients[place] = gradient
    return joined(parts, shape), [*gradients, *totals]


def split(per_token: Sequence[Tensor], chunk: int) -> list[tuple[Tensor, ...]]:
    """[B, L, ...] each -> chunks of [n, ...] each, at least one."""
    chunks = (torch.split(tensor.flatten(0, 1), chunk) for tensor in per_token)
    return list(zip(*chunks, strict=True))


def joined(parts: Sequence[tuple[Tensor, ...]], shape: torch.Size) -> tuple[Tensor, ...]:
    """Chunks of [n, ...] each -> [B, L, ...] each; `shape` is (B, L)."""
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return tuple(column.view(shape + column.shape[1:]) for column in columns)


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
        return output if bias is None else output + bias.to(output.dtype)


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


class Recomputed(torch.autograd.Function):
    """`in_chunks`: the first `count` of `inputs` are per token, the others parameters."""

    @staticmethod
    def forward(
        ctx: Any, function: PerToken, chunk: int, count: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.function, ctx.chunk, ctx.count = function, chunk, count
        kind = inputs[0].device.type
        precision = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.precision = kind, *precision
        parts = [function(*part) for part in split(inputs[:count], chunk)]
        return joined(parts, inputs[0].shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        per_token, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        with torch.autocast(*ctx.precision):
            _, gradients = with_gradients(
                ctx.function, ctx.chunk, per_token, parameters, lambda _: upstream
            )
        return None, None, None, *gradients


class WithGradients(torch.autograd.Function):
    """A value [] whose gradients with respect to `inputs` are known; None where none is wanted."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        products = (None if g is None else upstream * g for g in ctx.saved_tensors)
        return None, None, *products
