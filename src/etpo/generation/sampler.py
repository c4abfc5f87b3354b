"""Sample actions with a key-value cache, from exactly the distribution that is trained."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.generation.prefix_cache import Decoder
from etpo.models.causal_lm import trunk_of
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptBatch
from etpo.models.stopping import completes_stop_string


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
    """Generate one action per prompt.

    An action ends with a stop token of the policy, with the token that completes a stop string,
    or after `max_new_tokens` tokens. Each distinct prompt is computed once. Once half of the
    actions that are computed have ended, they are computed no longer.

    Args:
        generator: On the policy's device. Its draws for an action do not depend on when others
            end. None: greedy decoding, of each distinct prompt once.
        on_token: Called with the number of tokens after each of them.
    """
    if generator is None:
        prompts, index = distinct_prompts(prompts)
    size = len(prompts.ids), max_new_tokens
    device = policy.device
    ids, mask = torch.full(size, policy.pad_id), torch.zeros(size, dtype=torch.bool)
    ids, mask = ids.to(device), mask.to(device)
    length_limited = torch.zeros(size[0], dtype=torch.bool, device=device)
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    inputs = prompts.ids.to(device), prompts.mask.to(device), max_new_tokens
    decoder = Decoder(trunk_of(policy.model), *inputs, policy.shares_prefixes)
    hidden_states = decoder.hidden_states.new_zeros(*size, policy.hidden_size)
    running = torch.ones_like(decoder.rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        rows, states = decoder.rows, decoder.hidden_states[:, -1]
        noise = None
        if generator is not None:
            noise = torch.rand(size[0], dtype=torch.float64, device=device, generator=generator)
            noise = noise[rows]
        token = next_token(policy, states, noise).where(running, policy.pad_id)
        ids[rows, step], mask[rows, step] = token, running
        hidden_states[rows, step] = states.where(running[:, None], 0.0)
        seen, running = running, running & ~torch.isin(token, stop_ids)
        if policy.stop_strings:
            running = running & ~stopped(policy, ids[:, : step + 1], rows, prompts.rests)
        if on_token is not None:
            on_token(step + 1)
        remaining = int(running.sum())
        if step + 1 == max_new_tokens or remaining == 0:
            length_limited[rows] = running
            break
        if remaining <= len(rows) // 2:
            kept = decoder.select_rows(running)
            token, seen, running = token[kept], seen[kept], running[kept]
        decoder.step(token, seen)
    fields = ids[:, : step + 1], mask[:, : step + 1], hidden_states[:, : step + 1], length_limited
    if generator is None:
        return Sample(*(field[index] for field in fields))
    return Sample(*fields)


def next_token(policy: LanguageModelPolicy, hidden: Tensor, noise: Tensor | None) -> Tensor:
    """Return the token [b] that `noise` [b] draws at hidden states [b, D]; None: the likeliest."""
    log_pi = policy.log_probs(hidden).log_probs
    return log_pi.argmax(-1) if noise is None else inverse_cdf(log_pi, noise)


def inverse_cdf(log_p: Tensor, noise: Tensor) -> Tensor:
    """Return the token whose share of [0, 1) holds `noise`: [B, V] and [B] -> int64 [B].

    `noise` is float64 in [0, 1). In float64 noise * total < total, so that no token of probability
    0 is drawn after the last one that has some.
    """
    cdf = log_p.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]


def stopped(policy: LanguageModelPolicy, ids: Tensor, rows: Tensor, rests: Sequence[str]) -> Tensor:
    """Return whether a stop string ends the action, for `rows` [b] of ids [B, l]: bool [b]."""
    complete = [
        completes_stop_string(
            policy.tokenizer, policy.stop_strings, ids[row].tolist(), rests[row] if rests else ""
        )
        for row in rows.tolist()
    ]
    return torch.tensor(complete, device=ids.device)


def distinct_prompts(prompts: PromptBatch) -> tuple[PromptBatch, list[int]]:
    """Return each distinct prompt once, and the place of every row's among them."""
    rests = prompts.rests or ("",) * len(prompts.ids)
    fields = zip(prompts.ids.tolist(), prompts.mask.tolist(), rests, strict=True)
    keys = [(*ids, *mask, rest) for ids, mask, rest in fields]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    place = {key: number for number, key in enumerate(first)}
    rows = list(first.values())
    kept = tuple(rests[row] for row in rows) if prompts.rests else ()
    distinct = prompts._replace(ids=prompts.ids[rows], mask=prompts.mask[rows], rests=kept)
    return distinct, [place[key] for key in keys]


def decode_actions(policy: LanguageModelPolicy, prompts: PromptBatch, sample: Sample) -> list[str]:
    """Return the text of every sampled action [B]."""
    rests = prompts.rests or [""] * len(sample.ids)
    rows = zip(sample.ids.cpu(), sample.mask.cpu(), rests, strict=True)
    return [policy.decode(ids[mask].tolist(), rest) for ids, mask, rest in rows]
