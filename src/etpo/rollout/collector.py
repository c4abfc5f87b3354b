"""Plays a language model in a text environment; knows nothing of the algorithm or the task."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etpo.environments.text_env import TextObservation, TextVectorEnv
from etpo.models.backbone import Backbone, PromptBatch
from etpo.rollout.episode import Actions, Record, Rollout, pad_stack
from etpo.rollout.sampler import Sample, action_texts, sample

OnProgress = Callable[[str, int, int], None]


class Round(NamedTuple):
    """What one step of all environments left."""

    prompts: PromptBatch
    sample: Sample
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    step: Tensor


def collect(
    backbone: Backbone,
    environment: TextVectorEnv,
    rounds: int,
    max_new_tokens: int,
    generator: torch.Generator | None,
    seed: int,
    on_progress: OnProgress | None = None,
) -> Rollout:
    """Plays `rounds` actions in every environment, from fresh episodes; greedy without generator.

    Episodes that are open after the last round are truncated: their true next prompts are kept
    for bootstrapping. `on_progress(stage, done, total)` is called with stage "rollout".
    """
    observations, _ = environment.reset(seed=seed, options={"evaluation": generator is None})
    attempt = torch.zeros(environment.num_envs, dtype=torch.long)
    done: list[Round] = []
    records: list[Record] = []
    bootstrap: list[TextObservation] = []
    generate_seconds = score_seconds = 0.0
    for number in range(rounds):
        start = time.perf_counter()
        prompts = backbone.encode(observations)
        taken = sample(backbone, prompts, max_new_tokens, generator)
        texts = action_texts(backbone, taken)
        sampled = time.perf_counter()
        following, rewards, terminated, truncated, infos = environment.step(texts)
        generate_seconds += sampled - start
        score_seconds += time.perf_counter() - sampled
        ended = torch.as_tensor(terminated)
        cut = torch.as_tensor(truncated) & ~ended
        if number == rounds - 1:
            cut = ~ended
        records += written(backbone, prompts, attempt, texts, rewards, infos)
        for env in cut.nonzero().flatten().tolist():
            final = infos["final_obs"][env]
            bootstrap.append(following[env] if final is None else final)
        reward = torch.as_tensor(rewards, dtype=torch.float32)
        done.append(Round(prompts, taken, reward, ended, cut, attempt.clone()))
        attempt = torch.where(ended | cut, 0, attempt + 1)
        observations = following
        if on_progress is not None:
            on_progress("rollout", number + 1, rounds)
    next_prompts = encode_any(backbone, bootstrap)
    return Rollout(
        actions=stack(done, backbone.pad_id),
        bootstrap_ids=next_prompts.ids,
        bootstrap_mask=next_prompts.mask,
        records=records,
        num_envs=environment.num_envs,
        dropped_prompt_tokens=sum(r.prompts.dropped for r in done),
        generate_seconds=generate_seconds,
        score_seconds=score_seconds,
    )


def written(
    backbone: Backbone,
    prompts: PromptBatch,
    attempt: Tensor,
    texts: Sequence[str],
    rewards: Sequence[float],
    infos: dict[str, Any],
) -> list[Record]:
    """A round's actions as a person reads them, one per environment."""
    return [
        Record(
            env,
            int(attempt[env]) + 1,
            backbone.tokenizer.decode(prompts.ids[env][prompts.mask[env]]),
            text,
            float(rewards[env]),
            infos["error"][env],
            bool(infos["cached"][env]),
        )
        for env, text in enumerate(texts)
    ]


def encode_any(backbone: Backbone, observations: Sequence[TextObservation]) -> PromptBatch:
    """`backbone.encode`, for no observation too: [0, 1]."""
    if observations:
        return backbone.encode(observations)
    return PromptBatch(torch.zeros(0, 1).long(), torch.zeros(0, 1).bool(), 0)


def stack(rounds: list[Round], pad_id: int) -> Actions:
    """All rounds as one batch, ordered by round, then by environment."""
    return Actions(
        prompt_ids=pad_stack([r.prompts.ids for r in rounds], pad_id, left=True),
        prompt_mask=pad_stack([r.prompts.mask for r in rounds], False, left=True),
        action_ids=pad_stack([r.sample.ids.cpu() for r in rounds], pad_id, left=False),
        action_mask=pad_stack([r.sample.mask.cpu() for r in rounds], False, left=False),
        log_probs=pad_stack([r.sample.log_probs.cpu() for r in rounds], 0.0, left=False),
        rewards=torch.cat([r.rewards for r in rounds]),
        terminated=torch.cat([r.terminated for r in rounds]),
        truncated=torch.cat([r.truncated for r in rounds]),
        step=torch.cat([r.step for r in rounds]),
    )
