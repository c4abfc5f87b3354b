"""Evaluation of the taken tokens from hidden states, `chunk` tokens at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etpo.algorithms.returns import entropy, gather_tokens, kl_divergence
from etpo.models.chunked_logits import in_chunks
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.types import TokenBatch


class TokenEvaluation(NamedTuple):
    """Quantities of the taken tokens under pi_old; without gradient, [B, L] unless noted."""

    old_hidden: Tensor  # [B, L, D]
    ref_hidden: Tensor  # [B, L, D]
    log_pi: Tensor
    log_ref: Tensor
    kl: Tensor  # KL(pi_old || pi_ref), nats
    entropy: Tensor  # of pi_old, nats
    value: Tensor  # of the prefix; 0 without a critic
    q_taken: Tensor | None = None  # Q of the taken token
    critic_hidden: Tensor | None = None  # [B, L, C], of the target critic


class TokenValues(NamedTuple):
    """Critic outputs at prefixes; None if the algorithm has no such output."""

    value: Tensor | None = None  # float32 [B, L], NaN at untrained prefixes
    q: Tensor | None = None  # float32 [B, L, V]


def evaluate_tokens(
    policy: LanguageModelPolicy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    action_ids: Tensor,
    old_hidden: Tensor | None,
    chunk: int,
) -> TokenEvaluation:
    """Evaluate policy and reference at the L taken tokens of action_ids [B, L]; `value` is 0.

    Args:
        old_hidden: [B, L, D], hidden states of the policy; None computes them.
        chunk: number of tokens whose logits are in memory at once.
    """
    inputs = prompt_ids, prompt_mask, action_ids
    if old_hidden is None:
        old_hidden = policy.hidden_states(*inputs)
    ref_hidden = policy.hidden_states(*inputs, reference=True)

    def quantities(old: Tensor, ref: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        log_pi, _ = policy.log_probs(old, ids)
        log_ref, _ = policy.log_probs(ref, ids, reference=True)
        taken = (gather_tokens(each, ids) for each in (log_pi, log_ref))
        return *taken, kl_divergence(log_pi, log_ref), entropy(log_pi)

    log_pi, log_ref, kl, entropies = in_chunks(
        quantities, chunk, old_hidden, ref_hidden, action_ids
    )
    value = torch.zeros_like(log_pi)
    return TokenEvaluation(old_hidden, ref_hidden, log_pi, log_ref, kl, entropies, value)


def taken_log_probs(
    policy: LanguageModelPolicy, old_lm_head: nn.Module | None, batch: TokenBatch, chunk: int
) -> tuple[Tensor, Tensor]:
    """Compute log pi of the taken tokens and the log mass of the support, with gradient.

    Returns:
        [B, L] each, 0 on padding. The mass is the softmax probability of the support of pi_old.
    """

    def of_hidden(hidden: Tensor, ids: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        support = None
        if policy.min_p > 0:
            with torch.no_grad():
                support = policy.log_probs(old, ids, lm_head=old_lm_head).log_probs.isfinite()
        log_pi, log_mass = policy.log_probs(hidden, ids, support=support)
        return gather_tokens(log_pi, ids), log_mass

    hidden = policy.hidden_states(batch.prompt_ids, batch.prompt_mask, batch.action_ids)
    log_pi, log_mass = in_chunks(of_hidden, chunk, hidden, batch.action_ids, batch.old_hidden)
    mask = batch.action_mask
    return torch.where(mask, log_pi, 0.0), torch.where(mask, log_mass, 0.0)


def map_rows(function: Callable[..., NamedTuple], size: int, *inputs: Tensor) -> Any:
    """Apply `function` to `size` rows of the inputs at a time and concatenate its outputs."""
    parts: list[Any] = [
        function(*rows) for rows in zip(*(torch.split(x, size) for x in inputs), strict=True)
    ]
    kind, columns = type(parts[0]), list(zip(*parts, strict=True))
    del parts  # free the parts of a field before the next field is concatenated
    joined = []
    while columns:
        column = columns.pop(0)
        joined.append(None if column[0] is None else torch.cat(column))
    return kind(*joined)
