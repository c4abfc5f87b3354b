"""Sample actions with a key-value cache, from exactly the distribution that is trained."""

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
) -> Sample:
    """Generate one action per prompt.

    An action ends with a stop token of the policy, with the token that completes a stop string,
    or after `max_new_tokens` tokens. Each distinct prompt is computed once. Ended actions are
    dropped from the computation once they are half of it.

    generator: On the policy's device; its draws for an action do not depend on when others end.
    None: greedy decoding, of each distinct prompt once.
    """
    if generator is None:
        prompts, index = distinct_prompts(prompts)
    size, device = (len(prompts.ids), max_new_tokens), policy.device
    ids = torch.full(size, policy.pad_id, device=device)
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    inputs = prompts.ids.to(device), prompts.mask.to(device), max_new_tokens
    decoder = Decoder(trunk_of(policy.model), *inputs, policy.shares_prefixes)
    hidden_states = decoder.hidden_states.new_zeros(*size, policy.hidden_size)
    running = torch.ones_like(decoder.rows, dtype=torch.bool)
    length_limited = torch.zeros_like(running)
    for step in range(max_new_tokens):
        rows, states = decoder.rows, decoder.hidden_states[:, -1]
        if generator is None:
            token = policy.log_probs(states).log_probs.argmax(-1)
        else:
            noise = torch.rand(size[0], dtype=torch.float64, device=device, generator=generator)
            token = inverse_cdf(policy.log_probs(states).log_probs, noise[rows])
        token = token.where(running, policy.pad_id)
        ids[rows, step], mask[rows, step] = token, running
        hidden_states[rows, step] = states.where(running[:, None], 0.0)
        seen, running = running, running & ~torch.isin(token, stop_ids)
        if policy.stop_strings:
            actions = [(ids[row, : step + 1].tolist(), prompts.rests[row]) for row in rows.tolist()]
            strings = policy.tokenizer, policy.stop_strings
            ended = [completes_stop_string(*strings, *action) for action in actions]
            running = running & ~torch.tensor(ended, device=device)
        remaining = int(running.sum())
        if step + 1 == max_new_tokens or remaining == 0:
            length_limited[rows] = running
            break
        if remaining <= len(rows) // 2:
            kept = decoder.select_rows(running)
            token, seen, running = token[kept], seen[kept], running[kept]
        decoder.step(token, seen)
    fields = *(x[:, : step + 1] for x in (ids, mask, hidden_states)), length_limited
    return Sample(*fields) if generator is not None else Sample(*(x[index] for x in fields))


def inverse_cdf(log_p: Tensor, noise: Tensor) -> Tensor:
    """Return the token whose share of [0, 1) holds `noise`: [B, V] and [B] -> int64 [B].

    `noise` is float64 in [0, 1). In float64 noise * total < total, so that no token of probability
    0 is drawn.
    """
    cdf = log_p.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]


def distinct_prompts(prompts: PromptBatch) -> tuple[PromptBatch, list[int]]:
    """Return each distinct prompt once, and the place of every row's among them."""
    tokens = torch.cat([prompts.ids, prompts.mask], dim=1).tolist()
    place: dict[tuple[int | str, ...], int] = {}
    keys = ((*row, rest) for row, rest in zip(tokens, prompts.rests, strict=True))
    index = [place.setdefault(key, len(place)) for key in keys]
    rows = [index.index(number) for number in range(len(place))]
    rests = tuple(prompts.rests[row] for row in rows)
    return PromptBatch(prompts.ids[rows], prompts.mask[rows], prompts.dropped, rests), index


def decode_actions(policy: LanguageModelPolicy, prompts: PromptBatch, sample: Sample) -> list[str]:
    """Return the text of every sampled action [B]."""
    rows = zip(sample.ids.cpu(), sample.mask.cpu(), prompts.rests, strict=True)
    return [policy.decode(ids[mask].tolist(), rest) for ids, mask, rest in rows]
