"""Whether sampling, training and reference mean the same policy, before anything is learned."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from etpo.algorithms.returns import at_taken
from etpo.errors import ConfigError
from etpo.models import chunked_logits as chunked
from etpo.models.causal_lm import language_model
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.types import Actions

# Mean |difference| of logits that is rounding: a constant, and so many times the resolution of the
# largest logit. On 15 small models, mixtures of experts too, in 12 precisions and temperatures,
# rounding came to 1e-6 in float32 and to at most 0.6 of this in bfloat16, float16 and autocast;
# dropout of a tenth was above it in 179 of 180.
FLOOR, RESOLUTIONS = 0.01, 4.0


@torch.no_grad()
def check_policy(
    module: LightningModule,
    policy: LanguageModelPolicy,
    actions: Actions,
    batch: int,
    chunk: int | None = None,
    *,
    fresh: bool = False,
) -> None:
    """Raises ConfigError, on all ranks, where one has log-probabilities that differ.

    Compares those of the taken tokens that the sampler recorded with a training step's, in at most
    `batch` actions, and with the reference's where nothing was trained yet (`fresh`).
    chunk: tokens whose distributions are held at once, as `algorithm.logits_chunk_size`.
    """
    rows = torch.linspace(0, len(actions.rewards) - 1, min(batch, len(actions.rewards))).long()
    part = Actions(*(field[rows].to(policy.device) for field in actions))
    inputs = part.prompt_ids, part.prompt_mask, part.action_ids
    log_pi, log_kept = taken_log_probs(policy, inputs, chunk)
    gaps = [log_pi - part.log_probs]
    if fresh:
        log_ref, _ = taken_log_probs(policy, inputs, chunk, reference=True)
        gaps.append(log_pi + log_kept - log_ref)
    distances = [policy.temperature * gap[part.action_mask].abs().mean() for gap in gaps]
    gathered: Any = module.all_gather(torch.stack([*distances, rounding(policy, inputs)]))
    *worst, limit = gathered.view(-1, len(gaps) + 1).amax(0).tolist()
    allowed = f"on average, more than rounding ({limit:.2g})"
    kind = policy.model.config.model_type
    if not worst[0] <= limit:
        raise ConfigError(
            f"model.name_or_path: logits of {kind} differ by {worst[0]:.2g} between sampling and "
            f"training, {allowed}; allowed are models that compute both alike, in another "
            "model.attn_implementation or model.dtype perhaps"
        )
    if fresh and not worst[1] <= limit:
        raise ConfigError(
            f"model.lora: before the first update logits of {kind} differ by {worst[1]:.2g} "
            f"between policy and reference, {allowed}; allowed are adapters that change nothing yet"
        )


def taken_log_probs(
    policy: LanguageModelPolicy,
    inputs: tuple[Tensor, ...],
    chunk: int | None,
    *,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """log pi of the taken tokens and `log_kept`, [B, L] each, as a training step computes them."""
    action_ids = inputs[2]
    if chunk is None:
        output = policy(*inputs, reference=reference)
        return at_taken(output.log_probs, action_ids), output.log_kept

    def of_features(features: Tensor, action_ids: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, log_kept = policy.head(features, action_ids, reference=reference)
        return at_taken(log_probs, action_ids), log_kept

    features = policy.features(*inputs, reference=reference)
    log_pi, log_kept = chunked.in_chunks(of_features, chunk, features, action_ids)
    return log_pi, log_kept


def rounding(policy: LanguageModelPolicy, inputs: tuple[Tensor, ...]) -> Tensor:
    """The mean |difference| of logits, [], that rounding explains."""
    kind = policy.device.type
    dtypes = {p.dtype for p in policy.model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    resolution = max(torch.finfo(dtype).eps for dtype in dtypes)
    if torch.get_float32_matmul_precision() != "highest":  # TF32, or bfloat16
        resolution = max(resolution, 2.0**-10)
    prompt_ids, prompt_mask, action_ids = inputs
    logits, _ = policy.run(language_model, prompt_ids, prompt_mask, action_ids[:, :1])
    largest = logits[..., : policy.vocabulary_size].float().abs().amax(-1).mean()
    return FLOOR + RESOLUTIONS * resolution * largest
