"""Distributions over the vocabulary from logits: temperature, min-p truncation and log-mass."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class TokenDistribution(NamedTuple):
    """log_probs: float32 [..., V]; log_support_mass: float32 [...].

    log_support_mass: log of the mass that the whole softmax has on the tokens with probability.
    """

    log_probs: Tensor
    log_support_mass: Tensor


def scale_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """Scale and cap the LM head's output [..., V] as the model of this configuration does.

    Cohere multiplies, Granite divides, Gemma caps with tanh; most models do neither.
    """
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    scaling = getattr(config, "logits_scaling", None)
    if factor:
        logits = logits * factor
    if scaling:
        logits = logits * scaling if config.model_type == "hyperclovax" else logits / scaling
    for cap in (getattr(config, name, None) for name in SOFT_CAPS):
        if cap:
            logits = torch.tanh(logits / cap) * cap
    return logits


def token_distribution(
    logits: Tensor,
    temperature: float = 1.0,
    min_p: float = 0.0,
    *,
    allowed: Tensor | None = None,
    support: Tensor | None = None,
    taken: Tensor | None = None,
) -> TokenDistribution:
    """Compute softmax(logits / temperature) [..., V] over `allowed`, restricted to a support.

    Args:
        logits: Of V tokens, all that have a probability.
        temperature: Divides the logits.
        min_p: Tokens below this share of the likeliest token's probability get none
            (arXiv 2407.01082).
        allowed: bool [..., V], the action space; None: all tokens.
        support: bool [..., V], the tokens to keep in place of those that `min_p` selects.
        taken: int64 [..., C], tokens that are always kept: rounding may differ from that of the
            sampler which drew them.
    """
    if temperature != 1:
        logits = logits.float() / temperature
    if allowed is not None:
        logits = restricted(logits, allowed)
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    if min_p == 0 if support is None else support is allowed:
        return TokenDistribution(log_probs, torch.zeros_like(log_probs[..., 0]))
    if support is None:
        support = min_p_support(log_probs, min_p)
        if taken is not None:
            support = support.scatter(-1, taken, True)
    log_mass = (log_probs.exp() * support).sum(-1).log()
    return TokenDistribution(restricted(log_probs - log_mass.unsqueeze(-1), support), log_mass)


def restricted(logits: Tensor, support: Tensor) -> Tensor:
    """Return the logits [..., V], -inf outside the support, bool [..., V]."""
    # `where` is several times as fast as masked_fill
    return torch.where(support, logits, logits.new_tensor(float("-inf")))


def min_p_support(logits: Tensor, min_p: float) -> Tensor:
    """Return the tokens with at least `min_p` times the likeliest one's probability.

    logits: [..., V] -> bool [..., V].
    """
    logits = logits.float()  # bfloat16 rounds the threshold
    return logits >= logits.amax(-1, keepdim=True) + math.log(min_p)


def supported_distribution(
    logits: Tensor, temperature: float, min_p: float, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the distribution of `token_distribution` over fewer columns, with `min_p` > 0.

    Arguments as of `token_distribution`, for logits [n, V].

    Returns:
        log_probs: float32 [n, U] of the tokens that any row supports.
        places: int64 [U], these tokens.
    """
    if temperature != 1:
        logits = logits.float() / temperature
    if allowed is not None:
        logits = restricted(logits, allowed)
    support = min_p_support(logits, min_p)
    places = support.any(0).nonzero()[:, 0]
    kept = restricted(logits[:, places], support[:, places])
    return kept.log_softmax(-1, dtype=torch.float32), places
