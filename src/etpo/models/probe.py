"""Compare a model's logits with and without padding and cache, and with its LM head alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etpo.errors import ConfigError, described
from etpo.generation.prefix_cache import Decoder
from etpo.models.causal_lm import last_hidden_states, trunk_of
from etpo.models.prefix_tree import PrefixTree, prefix_tree
from etpo.models.tree_forward import forward_tree, is_recurrent

if TYPE_CHECKING:
    from etpo.models.policy import LanguageModelPolicy

PROMPTS, ACTION = (3, 24, 24), 3  # tokens; the last two prompts are equal
PACKED = 16  # tokens of a packed row, so that prompt and actions are computed one after the other


@torch.no_grad()
def check_forwards(policy: "LanguageModelPolicy", name_or_path: str) -> tuple[bool, bool]:
    """Return whether `SharedPrefixCache` decodes the model and `forward_tree` packs its tokens.

    Prompts of different lengths in one batch, as a whole and decoded with a cache, are compared
    with an ordinary forward of each by transformers: without padding, cache or positions. Raise
    ConfigError if they differ.
    """
    try:
        inputs = batch(policy)
        tree = prefix_tree(*inputs, torch.ones_like(inputs[-1]).bool(), limit=PACKED)
        expected, hidden = plain_forwards(policy, *inputs)
        checks = {
            "its logits are not finite": expected,
            "its LM head gives other logits at its last hidden states": policy.logits(hidden),
            "padding changes its logits": tree_logits(policy, tree, packed=False),
            "decoding with a cache changes its logits": decode(policy, inputs, False),
        }
        faults = (f for f, logits in checks.items() if not close(policy, logits, expected))
        fault = next(faults, None)
    except Exception as error:  # of a model that does not know the cache or an argument
        fault = f"its forward raises {described(error)}"
    if fault is not None:
        kind = policy.model.config.model_type
        raise ConfigError(
            f"model.name_or_path={name_or_path}: a model of type {kind} cannot be sampled and "
            f"trained here, since {fault}; allowed are causal language models whose logits do not "
            "depend on padding and caches"
        )
    return works(lambda: close(policy, decode(policy, inputs, True), expected)), (
        not is_recurrent(trunk_of(policy.model).config)
        and works(lambda: close(policy, tree_logits(policy, tree, packed=True), expected))
    )


def works(check: Callable[[], bool]) -> bool:
    """Return the result of a check, or False if it raises on another kind of attention."""
    try:
        return check()
    except Exception:
        return False


def tree_logits(policy: "LanguageModelPolicy", tree: PrefixTree, packed: bool) -> Tensor:
    """Return the logits [3, L, V] before each token of the actions."""
    return policy.logits(tree.of_tokens(forward_tree(trunk_of(policy.model), tree, packed)))


def batch(policy: "LanguageModelPolicy") -> tuple[Tensor, ...]:
    """Return prompts [3, P] padded on the left, their mask, and actions [3, L] of random tokens."""
    width = int(min(max(PROMPTS), policy.context_size - ACTION))
    generator = torch.Generator().manual_seed(0)
    size = len(PROMPTS), width + ACTION
    ids = torch.randint(policy.vocabulary_size, size, generator=generator)
    ids[-1, :width] = ids[-2, :width]
    mask = torch.arange(width) >= width - torch.tensor(PROMPTS).clamp(max=width)[:, None]
    prompts = ids[:, :width].where(mask, policy.pad_id)
    return tuple(x.to(policy.device) for x in (prompts, mask, ids[:, width:]))


def plain_forwards(
    policy: "LanguageModelPolicy", prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits [3, L, V] and last hidden states [3, L, D], each row computed alone."""
    logits, hidden = [], []
    trunk = trunk_of(policy.model)
    for prompt, mask, action in zip(prompt_ids, prompt_mask, action_ids, strict=True):
        ids = torch.cat([prompt[mask], action[:-1]])[None]
        logits.append(policy.model(input_ids=ids, use_cache=False).logits[:, -ACTION:])
        hidden.append(last_hidden_states(trunk, ACTION, input_ids=ids, use_cache=False))
    return torch.cat(logits)[..., : policy.vocabulary_size], torch.cat(hidden)


def decode(
    policy: "LanguageModelPolicy", inputs: tuple[Tensor, ...], share_prefixes: bool
) -> Tensor:
    """Return the logits [3, L, V] before each token of the actions, as the sampler decodes."""
    prompt_ids, prompt_mask, action_ids = inputs
    decoder = Decoder(trunk_of(policy.model), prompt_ids, prompt_mask, ACTION, share_prefixes)
    if share_prefixes and not decoder.shared:
        raise NotImplementedError("prompts cannot be shared")
    states = [decoder.hidden_states]
    for token in action_ids[decoder.rows, :-1].unbind(1):
        decoder.step(token[:, None], torch.ones_like(token[:, None], dtype=torch.bool))
        states.append(decoder.hidden_states)
    return policy.logits(torch.cat(states, dim=1)[decoder.rows.argsort()])


def close(policy: "LanguageModelPolicy", one: Tensor, other: Tensor) -> bool:
    """Return whether [B, L, V] are equal except for rounding, by each row's median token.

    A single token may be off in half precision: a mixture of experts may route it otherwise.
    """
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    spread = (other - other.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-6)
    errors = (one - other).norm(dim=-1) / spread
    # a wrong position or mask moves logits far more
    near = max(1e-3, 16 * torch.finfo(policy.model.dtype).eps)
    return bool(errors.median(1).values.max() <= near)
