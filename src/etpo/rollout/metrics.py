"""Metrics of a rollout; docs/metrics.md is the glossary."""

from torch import Tensor

from etpo.rollout.types import Rollout


def first_episode_reward(rollout: Rollout) -> Tensor:
    """Return the mean reward of the first episode in each environment, of what was played: []."""
    rewards, ended = (
        x.view(-1, rollout.num_envs)
        for x in (rollout.actions.rewards, rollout.actions.terminated | rollout.actions.truncated)
    )
    before = ended.int().cumsum(0) - ended.int()
    return (rewards * (before == 0)).sum(0).mean()


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Compute means over the fresh actions, and times, of this rank."""
    records = rollout.records
    first = [r.reward for r in records if r.attempt == 1]
    episodes = sum(r.attempt == 1 for r in records)
    tokens = int(rollout.actions.action_mask[: rollout.num_fresh].sum())
    return {
        "rollout/reward": sum(r.reward for r in records) / len(records),
        "rollout/first_attempt_reward": sum(first) / len(first),
        "rollout/episode_reward": sum(r.reward for r in records) / episodes,
        "rollout/best_reward": max(r.reward for r in records),
        "rollout/valid_rate": sum(r.error is None for r in records) / len(records),
        "rollout/refused_rate": sum(r.error is not None for r in records) / len(records),
        "rollout/length_limit_rate": sum(r.length_limited for r in records) / len(records),
        "rollout/distinct_actions": len({r.action for r in records}) / len(records),
        "rollout/cached_rate": sum(r.cached for r in records) / len(records),
        "rollout/action_tokens": tokens / len(records),
        "rollout/dropped_prompt_tokens": float(rollout.dropped_prompt_tokens),
        "time/generate_seconds": rollout.generate_seconds,
        "time/score_seconds": rollout.score_seconds,
        "time/tokens_per_second": tokens / rollout.generate_seconds,
    }
