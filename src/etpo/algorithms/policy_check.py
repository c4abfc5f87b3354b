"""Check that generation, training and reference compute the same policy."""

from typing import Any

import torch
from torch import Tensor

from etpo.errors import ConfigError
from etpo.models.chunked_logits import in_chunks
from etpo.models.policy import LanguageModelPolicy
from etpo.models.token_columns import TokenColumns
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

    fields = part.hidden_states, part.allowed, part.support
    recorded, allowed, support = (x.flatten(0, 1)[tree.first] for x in fields)

    def allowed_log_probs(hidden: Tensor, reference: bool = False) -> Tensor:
        """Compute log-probabilities [B, L] of the taken tokens among the allowed ones."""

        def of_hidden(hidden: Tensor, taken: Tensor, *sets: Tensor) -> tuple[Tensor]:
            columns = TokenColumns.of(policy.vocabulary_size, *sets)
            log_probs, log_mass = policy.log_probs(hidden, columns, reference=reference)
            return (log_probs.gather(-1, columns.places(taken)) + log_mass[:, None],)

        inputs = hidden, tree.taken, allowed, support
        return tree.of_taken(*in_chunks(of_hidden, chunk, *inputs))

    hidden = policy.hidden_states(tree)
    log_pi = allowed_log_probs(hidden)
    gaps = [log_pi - allowed_log_probs(recorded)]
    if fresh:
        states = policy.hidden_states(tree, reference=True)
        gaps.append(log_pi - allowed_log_probs(states, reference=True))
    distances = [policy.temperature * gap[part.step_mask].abs().mean() for gap in gaps]
    first = tree.of_first(hidden)
    gathered: Any = module.all_gather(torch.stack([*distances, rounding(policy, first)]))
    *worst, limit = gathered.view(-1, len(gaps) + 1).amax(0).tolist()
    by_chance = f"on average, more than rounding ({limit:.2g})"
    kind = policy.model.config.model_type
    if not worst[0] <= limit:
        raise ConfigError(
            f"model.name_or_path: logits of {kind} differ by {worst[0]:.2g} between generation and "
            f"training, {by_chance}; allowed are models that compute both alike. Another "
            "model.attn_implementation or model.dtype may help"
        )
    if fresh and not worst[1] <= limit:
        raise ConfigError(
            f"model.lora: before the first update logits of {kind} differ by {worst[1]:.2g} "
            f"between policy and reference, {by_chance}; allowed are adapters that start at zero"
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
