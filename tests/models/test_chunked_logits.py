"""Operators over the vocabulary in chunks of tokens: their values, gradients and memory."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from etpo.algorithms import losses, returns
from etpo.models import chunked_logits
from etpo.models.chunked_logits import in_chunks, reduce_in_chunks

from ..algorithms.doubly_robust import doubly_robust_objective as objective_of_tokens
from ..by_token import gather_tokens

TOKENS, SIZE, VOCABULARY = 6, 3, 5
BETA, ETA = 0.3, 0.2


def log_probs(features, head):
    """log-probabilities of a head [V, D], token 1 masked where the first feature is positive."""
    logits = linear(features, head)
    masked = torch.zeros_like(logits, dtype=torch.bool)
    masked[..., 1] = features[..., 0] > 0
    return logits.masked_fill(masked, float("-inf")).log_softmax(-1)


def reference(features, head):
    return linear(features, head).log_softmax(-1)


def value_of_q(x, given, taken, policy, critic, *_):
    return (returns.expectation(log_probs(x, policy), linear(x, critic)),)


def kl_to_reference(x, given, taken, policy, critic, ref, _):
    return (returns.kl_divergence(log_probs(x, policy), reference(x, ref)),)


def log_prob_taken(x, given, taken, policy, *_):
    return (gather_tokens(log_probs(x, policy), taken),)


def q_taken(x, given, taken, policy, critic, *_):
    return (gather_tokens(linear(x, critic), taken),)


def entropy(x, given, taken, policy, *_):
    log_pi = log_probs(x, policy)
    return (returns.expectation(log_pi, -log_pi),)


def held(given, critic, ref, old):
    """log pi_ref, log pi_old and Q, which get no gradient from the policy objective."""
    return reference(given, ref), reference(given, old), linear(given, critic)


def policy_objective(x, given, taken, policy, *heads):
    log_ref, log_old, q = held(given, *heads)
    return (
        losses.policy_objective(log_probs(x, policy), log_ref, log_old, q, BETA, ETA),
        returns.kl_divergence(log_old, log_ref).detach(),
    )


def doubly_robust_objective(x, given, taken, policy, *heads):
    log_ref, log_old, q = held(given, *heads)
    advantages = q.mean(-1) + 0.7 - gather_tokens(q, taken)
    log_pi = log_probs(x, policy)
    objective = objective_of_tokens(
        log_pi, log_ref, log_old, q, taken, advantages, BETA, ETA, clip=None
    )
    return objective, returns.expectation(log_pi, linear(x, policy))


OPERATORS = {
    "E_pi[Q]": value_of_q,
    "KL(pi || pi_ref)": kl_to_reference,
    "log pi(a)": log_prob_taken,
    "Q(a)": q_taken,
    "entropy": entropy,
    "policy objective": policy_objective,
    "doubly robust": doubly_robust_objective,
}
# these hold all but the policy's head fixed
OF_THE_POLICY_ALONE = ("policy objective", "doubly robust")


def inputs(tokens=TOKENS):
    """Features and fixed ones [N, D], taken tokens [N], four heads [V, D]; float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    # never the masked token 1
    taken = torch.randint(2, VOCABULARY, (tokens,), generator=generator)
    features, given = (draw(tokens, SIZE) for _ in range(2))
    return features, given.detach(), taken, *(draw(VOCABULARY, SIZE) for _ in range(4))


def weighted(first, *others):
    """A linear reduction in which every token of every output counts differently."""
    outputs = first, *others
    counts = torch.arange(1, 1 + first.numel(), dtype=first.dtype).view(first.shape)
    return sum((number + 1) * (counts * output).sum() for number, output in enumerate(outputs))


def recomputed(chunk, name, features, given, taken, *heads):
    outputs = in_chunks(
        lambda *x: OPERATORS[name](*x, *heads),
        chunk,
        features,
        given,
        taken,
    )
    return weighted(*outputs)


def reduced(chunk, name, features, given, taken, *heads):
    value, outputs = reduce_in_chunks(
        lambda *x: OPERATORS[name](*x, *heads),
        weighted,
        chunk,
        features,
        given,
        taken,
        parameters=[head for head in heads if head.requires_grad],
    )
    assert not any(output.requires_grad for output in outputs)
    assert torch.equal(value, weighted(*outputs))
    return value


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("form", [recomputed, reduced])
def test_values_and_gradients_are_those_of_all_tokens_at_once(name, form):
    features, *read, policy, critic, ref, old = inputs()
    heads = policy, critic, ref, old
    leaves = [features, *heads]
    options = {"allow_unused": True, "materialize_grads": True}
    expected = weighted(*OPERATORS[name](features, *read, *heads))
    gradients = torch.autograd.grad(expected, leaves, **options)
    assert gradients[0].abs().max() > 1e-3
    for chunk in (1, 4, 6, 100):
        value = form(chunk, name, features, *read, *heads)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        # as if more of the loss followed
        found = torch.autograd.grad(value.square(), leaves, **options)
        for own, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(own, 2 * expected * other, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert not form(4, name, features, *read, *heads).requires_grad


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("form", [recomputed, reduced])
def test_gradients_are_those_of_the_values(name, form):
    features, *read, policy, critic, ref, old = inputs()
    fixed = [head.detach() for head in (critic, ref, old)]

    def operator(features, *trained):
        heads = (*trained, *fixed[len(trained) - 1 :])
        return form(4, name, features, *read, *heads)

    trained = [policy] if name in OF_THE_POLICY_ALONE else [policy, critic, ref, old]
    assert gradcheck(operator, (features, *trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["recomputed", "reduced"])
def test_layers_with_a_bias_and_in_mixed_precision(form, dtype):
    layers = torch.nn.Sequential(torch.nn.Linear(SIZE, 8), torch.nn.Linear(8, VOCABULARY))
    parameters = list(layers.parameters())
    features = torch.randn(TOKENS, SIZE, requires_grad=True)
    found, seen = [], set()

    def first_log_prob(x):
        logits = chunked_logits.project_to_vocabulary(layers[1], layers[0](x))
        seen.add(logits.dtype)
        return (logits.float().log_softmax(-1)[..., 0],)

    for chunk in (100, 4):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            if form == "reduced":
                loss, _ = reduce_in_chunks(
                    first_log_prob, weighted, chunk, features, parameters=parameters
                )
            else:
                loss = weighted(*in_chunks(first_log_prob, chunk, features))
        assert seen.pop() == dtype
        found.append(torch.autograd.grad(loss, [features, *parameters]))
        assert seen <= {dtype}  # where it is evaluated again too
    near = 1e-5 if dtype == torch.float32 else 0.05
    for own, other in zip(*found, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=near, atol=near * float(own.abs().max()))


@pytest.mark.parametrize("form", [recomputed, reduced])
def test_no_tokens(form):
    features, *rest = inputs(tokens=0)
    value = form(2, "KL(pi || pi_ref)", features, *rest)
    assert value == 0
    value.backward()
    assert features.grad.shape == features.shape
    assert not rest[2].grad.any()


class MostTokens(TorchDispatchMode):
    """Record, in `tokens`, for how many tokens at once a tensor over the vocabulary is computed."""

    tokens = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(outputs):
            shape = tuple(getattr(tensor, "shape", ()))
            if VOCABULARY in shape and {VOCABULARY, SIZE} != set(shape) and len(shape) > 1:
                self.tokens = max(self.tokens, tensor.numel() // VOCABULARY)
        return outputs


@pytest.mark.parametrize("form", [recomputed, reduced])
@pytest.mark.parametrize("chunk", [100, 2])
def test_no_more_than_a_chunk_goes_through_the_vocabulary(form, chunk):
    read = inputs()
    with MostTokens() as most:
        form(chunk, "doubly robust", *read).backward()
    assert most.tokens == min(chunk, TOKENS)


@pytest.mark.parametrize("form", ["recomputed", "reduced"])
def test_layers_over_the_vocabulary_hold_one_gradient_of_their_weight(form, monkeypatch):
    layer = torch.nn.Linear(SIZE, VOCABULARY)
    hidden = torch.randn(TOKENS, SIZE, requires_grad=True)
    leaves = [hidden, *layer.parameters()]
    found, calls = [], []
    summed = chunked_logits.LinearIntoSum.backward
    monkeypatch.setattr(
        chunked_logits.LinearIntoSum,
        "backward",
        staticmethod(lambda ctx, upstream: calls.append(summed(ctx, upstream)) or calls[-1]),
    )

    def first_log_prob(x):
        return (chunked_logits.project_to_vocabulary(layer, x).log_softmax(-1)[..., 0].square(),)

    for chunk in (100, 2):
        if form == "reduced":
            loss, _ = reduce_in_chunks(
                first_log_prob, weighted, chunk, hidden, parameters=leaves[1:]
            )
        else:
            loss = weighted(*in_chunks(first_log_prob, chunk, hidden))
        found.append(torch.autograd.grad(loss.square(), leaves))
    assert len(calls) == 3  # one per chunk of two tokens; none for a single chunk
    assert all(weight is None for _, weight, _ in calls)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
