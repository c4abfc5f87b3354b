"""Runs a few tokens through a model and compares its logits with and without padding and cache."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etpo.errors import ConfigError, described
from etpo.generation.prefix_cache import decoding_cache, run_next
from etpo.models.causal_lm import last_hidden_states, trunk_of
from etpo.models.shared_prompt import Run, prefill

if TYPE_CHECKING:
    from etpo.models.policy import LanguageModelPolicy

PROMPTS, ACTION = (3, 24), 3  # tokens


@torch.no_grad()
def check_forwards(policy: "LanguageModelPolicy", name_or_path: str) -> None:
    """Raises ConfigError unless sampler, annotation and critics read what transformers computes.

    Two prompts of different lengths in one batch, decoded with a cache and annotated, are compared
    with an ordinary forward of each: without padding, cache or positions.
    """
    try:
        fault = find_fault(policy)
    except Exception as error:  # of a model that does not know the cache or an argument
        fault = f"its forward raises {described(error)}"
    if fault is not None:
        kind = policy.model.config.model_type
        raise ConfigError(
            f"model.name_or_path={name_or_path}: a model of type {kind} cannot be sampled and "
            f"trained here, since {fault}; allowed are causal language models whose logits do not "
            "depend on padding and caches"
        )


def find_fault(policy: "LanguageModelPolicy") -> str | None:
    """Return what is wrong, or None."""
    inputs = batch(policy)
    run = functools.partial(last_hidden_states, trunk_of(policy.model))
    same = functools.partial(close, dtype=policy.model.dtype)
    whole = [
        torch.cat([ids[mask], action[:-1]])[None] for ids, mask, action in zip(*inputs, strict=True)
    ]
    plain = torch.cat(
        [policy.model(input_ids=ids, use_cache=False).logits[:, -ACTION:] for ids in whole]
    )
    plain = plain[..., : policy.vocabulary_size]
    if not plain.isfinite().all():
        return "its logits are not finite"
    alone = torch.cat([run(last=ACTION, input_ids=ids, use_cache=False) for ids in whole])
    own = policy.logits(alone)
    if own.shape != plain.shape or not same(own, plain):
        return "its LM head makes other logits of its last hidden states"
    if not same(policy.logits(policy.hidden_states(*inputs)), plain):
        return "padding on the left changes its logits"
    if not same(policy.logits(torch.cat(list(decoded(run, policy, *inputs)), 1)), plain):
        return "decoding with a cache changes its logits"
    return None


def batch(policy: "LanguageModelPolicy") -> tuple[Tensor, Tensor, Tensor]:
    """Prompts [2, P] padded on the left, their mask, and actions [2, L] of random tokens."""
    width = int(min(PROMPTS[-1], policy.context_size - ACTION))
    generator = torch.Generator().manual_seed(0)
    size = len(PROMPTS), width + ACTION
    ids = torch.randint(policy.vocabulary_size, size, generator=generator)
    lengths = torch.tensor(PROMPTS).clamp(max=width)
    mask = torch.arange(width) >= width - lengths[:, None]
    prompts = ids[:, :width].where(mask, policy.pad_id)
    return tuple(x.to(policy.device) for x in (prompts, mask, ids[:, width:]))


def decoded(
    run: Run,
    policy: "LanguageModelPolicy",
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    action_ids: Tensor,
) -> Iterator[Tensor]:
    """Yield hidden states [2, 1, D] before each token of the actions, as the sampler decodes."""
    config = policy.model.config
    filled = prefill(run, config, prompt_ids, prompt_mask)
    cache = decoding_cache(config, filled, ACTION)
    rows, mask = cache.order, prompt_mask[cache.order]
    back = rows.argsort()
    yield filled.hidden_states[filled.prompt_index]
    for token in action_ids[rows, :-1].unbind(1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        yield run_next(run, config, cache, token, mask)[back]


def close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether [B, L, X] are equal but for the rounding of `dtype`, by each row's median token.

    A single token may be off in half precision: a mixture of experts may route it otherwise.
    """
    one, other = one.float(), other.float()
    spread = (other - other.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-6)
    errors = (one - other).norm(dim=-1) / spread
    near = max(1e-3, 16 * torch.finfo(dtype).eps)  # a wrong position or mask moves far more
    return bool(errors.median(1).values.max() <= near)
