"""Decoding with a key-value cache, from exactly the distribution that is trained."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.generation.prefix_cache import decoding_cache, run_next
from etpo.models.causal_lm import last_hidden_states, trunk_of
from etpo.models.policy import LanguageModelPolicy, PromptBatch
from etpo.models.shared_prompt import prefill


class Sample(NamedTuple):
    """Sampled actions: ids int64 and mask bool, [B, L].

    hidden_states: [B, L, D], the last hidden states that the tokens were drawn from, 0 where `mask`
    is false. length_limited: bool [B], cut after `max_new_tokens` tokens.
    """

    ids: Tensor
    mask: Tensor
    hidden_states: Tensor
    length_limited: Tensor


@torch.no_grad()
def generate(
    policy: LanguageModelPolicy,
    prompts: PromptBatch,
    max_new_tokens: int,
    generator: torch.Generator | None,
    on_token: Callable[[int], None] | None = None,
) -> Sample:
    """One action per prompt; greedy where `generator` is None.

    An action ends with a stop token of the policy, with the token that completes a stop string,
    or after `max_new_tokens` tokens. Equal prompts are computed once. Once half of the actions that
    are computed have ended, they are computed no longer. `generator` lives on the policy's
    device; what it draws for an action does not depend on when others end.
    """
    device = policy.device
    mask = prompts.mask.to(device)
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    run = functools.partial(last_hidden_states, trunk_of(policy.model))
    config = policy.model.config
    filled = prefill(run, config, prompts.ids.to(device), mask)
    cache = decoding_cache(config, filled, max_new_tokens)
    rows = cache.order  # the actions that are computed
    states = filled.hidden_states[filled.prompt_index[rows]]
    del filled  # the cache has a copy
    mask = mask[rows]
    size = len(rows), max_new_tokens
    ids = torch.full(size, policy.pad_id, device=device)
    masks = torch.zeros(size, dtype=torch.bool, device=device)
    hidden_states = states.new_zeros(*size, states.shape[-1])
    running = torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        log_pi = policy.log_probs(states[:, -1]).log_probs
        if generator is None:
            token = log_pi.argmax(-1)
        else:
            noise = torch.rand(size[0], dtype=torch.float64, device=device, generator=generator)
            token = inverse_cdf(log_pi, noise[rows])
        token = token.where(running, policy.pad_id)
        ids[rows, step] = token
        masks[rows, step] = running
        hidden_states[rows, step] = states[:, -1].where(running[:, None], 0.0)
        mask = torch.cat([mask, running[:, None]], dim=1)
        running = running & ~torch.isin(token, stop_ids)
        if policy.stop_strings:
            running = running & ~stopped(policy, ids[:, : step + 1], rows, prompts.rests)
        if on_token is not None:
            on_token(step + 1)
        remaining = int(running.sum())
        if step + 1 == max_new_tokens or remaining == 0:
            break
        if remaining <= len(rows) // 2:
            kept = cache.keep(running.nonzero()[:, 0])
            rows, mask, token, running = rows[kept], mask[kept], token[kept], running[kept]
        states = run_next(run, config, cache, token, mask)
    length_limited = torch.zeros(size[0], dtype=torch.bool, device=device)
    length_limited[rows] = running
    ids, masks, hidden_states = (field[:, : step + 1] for field in (ids, masks, hidden_states))
    return Sample(ids, masks, hidden_states, length_limited)


def inverse_cdf(log_p: Tensor, noise: Tensor) -> Tensor:
    """The token whose share of [0, 1) holds `noise`: [B, V] log-probabilities, [B] -> int64 [B].

    `noise` is float64 in [0, 1). In float64 noise * total < total, so that none without probability
    is drawn after the last one that has some.
    """
    cdf = log_p.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]


def decode_actions(policy: LanguageModelPolicy, prompts: PromptBatch, sample: Sample) -> list[str]:
    """The text of every sampled action [B]."""
    rests = prompts.rests or [""] * len(sample.ids)
    rows = zip(sample.ids.cpu(), sample.mask.cpu(), rests, strict=True)
    return [policy.decode(ids[mask].tolist(), rest) for ids, mask, rest in rows]


def stopped(policy: LanguageModelPolicy, ids: Tensor, rows: Tensor, rests: Sequence[str]) -> Tensor:
    """Whether a stop string ends the action in each of `rows` [b] of ids [B, l]: bool [b]."""
    ends = [
        policy.completes_stop_string(ids[row].tolist(), rests[row] if rests else "")
        for row in rows.tolist()
    ]
    return torch.tensor(ends, device=rows.device)
