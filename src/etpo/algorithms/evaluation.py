"""Evaluation of the taken tokens from hidden states, `chunk` prefixes at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from etpo.algorithms.returns import entropy, kl_divergence
from etpo.models.chunked_logits import in_chunks
from etpo.models.distribution import restricted
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prefix_tree import PrefixTree, first_step
from etpo.models.token_columns import TokenColumns, columns_of, pack_ids, unpack
from etpo.rollout.types import PrefixStates, TokenBatch


class TokenEvaluation(NamedTuple):
    """Quantities of the taken tokens under pi_old: [B, L] each, 0 on padding, without gradient."""

    tree: PrefixTree
    states: PrefixStates
    log_pi: Tensor
    log_ref: Tensor
    kl: Tensor  # KL(pi_old || pi_ref) at the prefix, nats
    entropy: Tensor  # of pi_old at the prefix, nats
    value: Tensor  # of the prefix; 0 without a critic
    q_taken: Tensor | None = None  # Q of the taken token


class PrefixValues(NamedTuple):
    """Critic outputs at prefixes; None if the algorithm has no such output."""

    value: Tensor | None = None  # float32 [N], NaN at untrained prefixes
    q: Tensor | None = None  # float32 [N, V]


def values_of_first(tree: PrefixTree, values: Tensor) -> Tensor:
    """Return values [N] of the prefixes before a first step, NaN for others: [N]."""
    found = torch.full_like(values, float("nan"))
    # one may also be a prefix inside another action
    first = tree.prefix.gather(1, first_step(tree.mask))[:, 0]
    found[first] = values[first]
    return found


def prefix_states(
    policy: LanguageModelPolicy,
    tree: PrefixTree,
    chunk: int,
    allowed: Tensor | None,
    support: Tensor | None = None,
    old_hidden: Tensor | None = None,
    *,
    keep_taken: bool = True,
) -> PrefixStates:
    """Compute hidden states of policy and reference, and the support of the policy.

    Args:
        chunk: number of prefixes whose logits are in memory at once.
        allowed: int32 [N, W], the action space; W = 0 or None for the whole vocabulary.
        support: int32 [N, W], of the policy that sampled; None: of the policy.
        keep_taken: add the taken tokens to that of the policy.
        old_hidden: [N, D], hidden states recorded during generation; None computes them.
    """
    if allowed is None:
        allowed = torch.zeros(len(tree.node), 0, dtype=torch.int32, device=tree.node.device)
    if old_hidden is None:
        old_hidden = policy.hidden_states(tree)
    if support is None and policy.min_p == 0:
        support = allowed
    elif support is None:

        def supported(hidden: Tensor, allowed: Tensor, taken: Tensor) -> tuple[Tensor]:
            support = policy.supported(hidden, allowed)[2]
            if keep_taken:
                support = support | pack_ids(taken, policy.vocabulary_size)
            return (support,)

        (support,) = in_chunks(supported, chunk, old_hidden, allowed, tree.taken)
    ref_hidden = policy.hidden_states(tree, reference=True)
    log_mass = torch.zeros(len(allowed), device=allowed.device)
    if policy.min_p > 0:

        def mass(hidden: Tensor, allowed: Tensor, support: Tensor) -> tuple[Tensor]:
            columns = TokenColumns.of(policy.vocabulary_size, allowed)
            log_probs, _ = policy.log_probs(hidden, columns, reference=True)
            ids = columns_of(support, policy.vocabulary_size)
            if ids is not None:  # fewer columns
                log_probs = log_probs[:, columns.places(ids)]
            kept = unpack(support, ids, policy.vocabulary_size)
            return (restricted(log_probs, kept).logsumexp(-1),)

        (log_mass,) = in_chunks(mass, chunk, ref_hidden, allowed, support)
    return PrefixStates(
        old_hidden, ref_hidden, allowed, support, log_mass, old_hidden.new_zeros(len(allowed), 0)
    )


def support_columns(policy: LanguageModelPolicy, states: PrefixStates) -> TokenColumns:
    """Return the columns of the tokens that the policy that sampled supports."""
    return TokenColumns.of(policy.vocabulary_size, states.support, states.support)


def reference_log_probs(
    policy: LanguageModelPolicy, states: PrefixStates, columns: TokenColumns
) -> Tensor:
    """Compute log pi_ref [n, U] of the columns' tokens; -inf outside the support."""
    log_probs, _ = policy.log_probs(states.ref, columns.supported(), reference=True)
    return log_probs + states.ref_log_mass[:, None]


def evaluate_tokens(
    policy: LanguageModelPolicy, tree: PrefixTree, states: PrefixStates, chunk: int
) -> TokenEvaluation:
    """Evaluate policy and reference at the taken tokens; `value` is 0."""

    def quantities(taken: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        states = PrefixStates(*parts)
        columns = support_columns(policy, states)
        log_pi, _ = policy.log_probs(states.old, columns)
        log_ref = reference_log_probs(policy, states, columns)
        log_probs = (each.gather(-1, columns.places(taken)) for each in (log_pi, log_ref))
        return *log_probs, kl_divergence(log_pi, log_ref), entropy(log_pi)

    log_pi, log_ref, kl, entropies = in_chunks(quantities, chunk, tree.taken, *states)
    taken = (tree.of_taken(each) for each in (log_pi, log_ref))
    prefixes = (tree.of_tokens(each) for each in (kl, entropies, torch.zeros_like(kl)))
    return TokenEvaluation(tree, states, *taken, *prefixes)


def taken_log_probs(
    policy: LanguageModelPolicy, batch: TokenBatch, chunk: int, with_mass: bool
) -> tuple[Tensor, Tensor]:
    """Compute log pi of the taken tokens and the log mass of the support, with gradient.

    Returns:
        [B, L] each, 0 where there is no step. The mass is the softmax probability of the support of
        pi_old among the allowed tokens; 0 without `with_mass`.
    """

    def of_hidden(hidden: Tensor, taken: Tensor, *sets: Tensor) -> tuple[Tensor, Tensor]:
        columns = loss_columns(policy, *sets, with_mass=with_mass)
        log_pi, log_mass = policy.log_probs(hidden, columns)
        return log_pi.gather(-1, columns.places(taken)), log_mass

    tree, states = batch.tree, batch.states
    inputs = policy.hidden_states(tree), tree.taken, states.allowed, states.support
    log_pi, log_mass = in_chunks(of_hidden, chunk, *inputs)
    return tree.of_taken(log_pi), tree.of_tokens(log_mass)


def loss_columns(
    policy: LanguageModelPolicy, allowed: Tensor, support: Tensor, *, with_mass: bool
) -> TokenColumns:
    """Return the columns of a loss; the mass of the support needs all allowed tokens."""
    return TokenColumns.of(policy.vocabulary_size, allowed if with_mass else support, support)
