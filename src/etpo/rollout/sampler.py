"""Decoding with a key-value cache, from exactly the distribution that is trained."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import StopStringCriteria

from etpo.models.backbone import Backbone, PromptBatch, language_model
from etpo.models.shared_prompt import encode_prompts, position_ids


class Sample(NamedTuple):
    """ids int64, mask bool, log_probs float32 of the taken tokens: each [B, L]."""

    ids: Tensor
    mask: Tensor
    log_probs: Tensor


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: PromptBatch,
    max_new_tokens: int,
    generator: torch.Generator | None,
    on_token: Callable[[int], None] | None = None,
) -> Sample:
    """One action per prompt; greedy where `generator` is None.

    An action ends with a stop token of the backbone, with the token that completes a stop string,
    or after `max_new_tokens` tokens. `generator` lives on the backbone's device.
    """
    device = backbone.device
    mask = prompts.mask.to(device)
    stop_ids = torch.tensor(backbone.stop_ids, device=device)
    stop_strings = (
        StopStringCriteria(backbone.tokenizer, backbone.stop_strings)
        if backbone.stop_strings
        else None
    )
    run = functools.partial(language_model, backbone.policy)
    (logits, _), cache = encode_prompts(run, backbone.policy.config, prompts.ids.to(device), mask)
    running = torch.ones(len(mask), dtype=torch.bool, device=device)
    ids, masks, log_probs = [], [], []
    for step in range(max_new_tokens):
        log_pi = backbone.normalise(logits[:, -1])
        if backbone.min_p > 0:
            log_pi = log_pi.masked_fill(~backbone.supported(log_pi), float("-inf")).log_softmax(-1)
        if generator is None:
            token = log_pi.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(log_pi.exp(), 1, generator=generator)
        token = torch.where(running[:, None], token, backbone.pad_id)
        ids.append(token)
        masks.append(running[:, None])
        log_probs.append(log_pi.gather(-1, token).where(running[:, None], 0.0))
        mask = torch.cat([mask, running[:, None]], dim=1)
        running = running & ~torch.isin(token[:, 0], stop_ids)
        if stop_strings is not None:
            running = running & ~stop_strings(torch.cat(ids, dim=1), None)
        if on_token is not None:
            on_token(step + 1)
        if step + 1 == max_new_tokens or not running.any():
            break
        logits, _ = run(
            last=1,
            input_ids=token,
            attention_mask=mask.long(),
            position_ids=position_ids(mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
    return Sample(torch.cat(ids, dim=1), torch.cat(masks, dim=1), torch.cat(log_probs, dim=1))


def action_texts(backbone: Backbone, taken: Sample) -> list[str]:
    """The text of every sampled action [B]."""
    rows = zip(taken.ids.cpu(), taken.mask.cpu(), strict=True)
    return [backbone.decode(ids[mask].tolist()) for ids, mask in rows]
