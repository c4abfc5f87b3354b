"""Check that generation, training and reference compute the same policy."""

from typing import Any

import torch
from torch import Tensor

from etpo.errors import ConfigError
from etpo.models.chunked_logits import in_chunks
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.types import Actions

# Tolerance of the mean |difference| of logits: a constant, and a multiple of the resolution of the
# largest logit. On 15 small models (with mixtures of experts) in 12 precisions and temperatures
# rounding reached 1e-6 in float32, and at most 0.6 of the tolerance in bfloat16, float16 and
# autocast. Dropout of 0.1 exceeded the tolerance in 179 of 180 runs.
FLOOR, RESOLUTIONS = 0.01, 4.0
ACTIONS = 64


@torch.no_grad()
def check_policy(module: Any, actions: Actions, *, fresh: bool) -> None:
    """Raise ConfigError, on all ranks, if log-probabilities of the taken tokens differ.

    Compares the hidden states recorded during generation with a training forward of at most
    `ACTIONS` actions.

    Args:
        fresh: also compare with the reference, before the first update.
    """
    policy: LanguageModelPolicy = module.policy
    chunk: int = module.settings.logits_chunk_size
    count = min(ACTIONS, len(actions.rewards))
    part = actions.select(torch.linspace(0, len(actions.rewards) - 1, count).long())
    part = Actions(*(x.to(policy.device) for x in part))
    tree = part.tree()

    def taken(hidden: Tensor, reference: bool = False) -> tuple[Tensor, Tensor]:
        def of_hidden(hidden: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
            log_probs, log_mass = policy.log_probs(hidden, taken, reference=reference)
            return log_probs.gather(-1, taken), log_mass

        log_pi, log_mass = in_chunks(of_hidden, chunk, hidden, tree.taken)
        return tree.of_taken(log_pi), tree.of_tokens(log_mass)

    hidden = policy.hidden_states(tree)
    log_pi, log_mass = taken(hidden)
    gaps = [log_pi - taken(part.hidden_states.flatten(0, 1)[tree.first])[0]]
    if fresh:
        log_ref, _ = taken(policy.hidden_states(tree, reference=True), reference=True)
        gaps.append(log_pi + log_mass - log_ref)
    distances = [policy.temperature * gap[part.action_mask].abs().mean() for gap in gaps]
    first = hidden[tree.prefix[:, 0]]
    gathered: Any = module.all_gather(torch.stack([*distances, rounding(policy, first)]))
    *worst, limit = gathered.view(-1, len(gaps) + 1).amax(0).tolist()
    allowed = f"on average, more than rounding ({limit:.2g})"
    kind = policy.model.config.model_type
    if not worst[0] <= limit:
        raise ConfigError(
            f"model.name_or_path: logits of {kind} differ by {worst[0]:.2g} between generation and "
            f"training, {allowed}; allowed are models that compute both alike. Another "
            "model.attn_implementation or model.dtype may help"
        )
    if fresh and not worst[1] <= limit:
        raise ConfigError(
            f"model.lora: before the first update logits of {kind} differ by {worst[1]:.2g} "
            f"between policy and reference, {allowed}; allowed are adapters that start at zero"
        )


def rounding(policy: LanguageModelPolicy, hidden: Tensor) -> Tensor:
    """Return the largest mean |difference| of logits, [], that rounding can cause.

    hidden: [B, D], hidden states whose logits set the scale.
    """
    kind = policy.device.type
    dtypes = {p.dtype for p in policy.model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    resolution = max(torch.finfo(dtype).eps for dtype in dtypes)
    if torch.get_float32_matmul_precision() != "highest":  # TF32, or bfloat16
        resolution = max(resolution, 2.0**-10)
    largest = policy.logits(hidden).float().abs().amax(-1).mean()
    return FLOOR + RESOLUTIONS * resolution * largest
