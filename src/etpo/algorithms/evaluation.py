"""Evaluation of the taken tokens from hidden states, `chunk` prefixes at a time."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from etpo.algorithms.returns import entropy, kl_divergence
from etpo.models.chunked_logits import in_chunks
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prefix_tree import PrefixTree
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


def values_of_prompts(tree: PrefixTree, values: Tensor) -> Tensor:
    """Return values [N] of the prefixes that are prompts, NaN for others: [N]."""
    found = torch.full_like(values, float("nan"))
    prompts = tree.prefix[:, 0]  # one may also be a prefix inside another action
    found[prompts] = values[prompts]
    return found


def evaluate_tokens(
    policy: LanguageModelPolicy, tree: PrefixTree, old_hidden: Tensor | None, chunk: int
) -> TokenEvaluation:
    """Evaluate policy and reference at the taken tokens; `value` is 0.

    Args:
        old_hidden: [N, D], hidden states of the policy; None computes them.
        chunk: number of prefixes whose logits are in memory at once.
    """
    if old_hidden is None:
        old_hidden = policy.hidden_states(tree)
    ref_hidden = policy.hidden_states(tree, reference=True)

    def quantities(old: Tensor, ref: Tensor, taken: Tensor) -> tuple[Tensor, ...]:
        log_pi, _ = policy.log_probs(old, taken)
        log_ref, _ = policy.log_probs(ref, taken, reference=True)
        log_probs = (each.gather(-1, taken) for each in (log_pi, log_ref))
        return *log_probs, kl_divergence(log_pi, log_ref), entropy(log_pi)

    log_pi, log_ref, kl, entropies = in_chunks(
        quantities, chunk, old_hidden, ref_hidden, tree.taken
    )
    taken = (tree.of_taken(each) for each in (log_pi, log_ref))
    prefixes = (tree.of_tokens(each) for each in (kl, entropies, torch.zeros_like(kl)))
    return TokenEvaluation(tree, PrefixStates(old_hidden, ref_hidden), *taken, *prefixes)


def taken_log_probs(
    policy: LanguageModelPolicy, old_lm_head: nn.Module | None, batch: TokenBatch, chunk: int
) -> tuple[Tensor, Tensor]:
    """Compute log pi of the taken tokens and the log mass of the support, with gradient.

    Returns:
        [B, L] each, 0 on padding. The mass is the softmax probability of the support of pi_old.
    """

    def of_hidden(hidden: Tensor, taken: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        support = None
        if policy.min_p > 0:
            with torch.no_grad():
                support = policy.log_probs(old, taken, lm_head=old_lm_head).log_probs.isfinite()
        log_pi, log_mass = policy.log_probs(hidden, taken, support=support)
        return log_pi.gather(-1, taken), log_mass

    tree = batch.tree
    hidden = policy.hidden_states(tree)
    log_pi, log_mass = in_chunks(of_hidden, chunk, hidden, tree.taken, batch.states.old)
    return tree.of_taken(log_pi), tree.of_tokens(log_mass)
