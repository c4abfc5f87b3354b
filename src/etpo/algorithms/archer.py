"""ArCHer: a critic of whole utterances and a policy gradient of tokens (arXiv 2402.19446)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etpo.algorithms import losses as objectives
from etpo.algorithms.base import TokenValues
from etpo.algorithms.ppo import PolicyGradient, Taken, TakenBatch, at_prompt
from etpo.algorithms.returns import at_taken
from etpo.errors import ConfigError, check_range
from etpo.models import chunked_logits as chunked
from etpo.models.critics import WITH_HEAD, Critic, LanguageModelCritic, polyak_update, target_of
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.types import Actions, Rollout, episode_steps, following_values, pack, unpack


class UtteranceBatch(NamedTuple):
    """`TakenBatch` and what V(o) is fitted to."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    action_ids: Tensor
    action_mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    features: Tensor
    support: Tensor
    old_features: Tensor
    advantages: Tensor
    returns: Tensor  # float32 [B, L], r + gamma V(o')
    weights: Tensor
    utterance_q: Tensor  # float32 [B], Q(o, a) of the target critic


class ArCHer(PolicyGradient):
    """Q(o, a) and V(o) of whole actions by temporal differences; every token gets Q(o, a) - V(o).

    One network for both: the dueling head's value at the prompt is V(o), its Q of the last token
    given all before is Q(o, a). Targets, from the Polyak average: r + gamma V(o') for Q and Q(o, a)
    for V (the paper's equations 2 and 3, on fresh actions in place of its replay buffer). The
    reward carries the KL penalty -beta log(pi/pi_ref) of the action.

    tau: Polyak step of the target critic after each iteration, in (0, 1]; other arguments as in
    `PolicyGradient`.
    """

    critic: Critic

    def __init__(
        self,
        policy: Callable[[], LanguageModelPolicy],
        critic: Callable[[LanguageModelPolicy], Critic],
        *args: Any,
        tau: float,
        **shared: Any,
    ) -> None:
        check_range("algorithm.tau", tau, 0, 1, above=True)
        super().__init__(policy, critic, *args, **shared)
        self.tau = tau
        if isinstance(self.critic, LanguageModelCritic):
            raise ConfigError(f"critic=lm_copy: allowed are {', '.join(WITH_HEAD)}")
        self.target_critic = target_of(self.critic)

    def prefix_values(self, *inputs: Tensor) -> Tensor:
        return self.scores(self.target_critic, *inputs)[0]

    def scores(
        self,
        critic: Critic,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The value of every prefix and the advantage of its taken token: [B, L], [B, L]."""
        inputs = prompt_ids, prompt_mask, action_ids, features
        if self.logits_chunk_size is None:
            value, advantage = critic(*inputs)
            return value, at_taken(advantage, action_ids)

        def scores_of(states: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
            value, advantage = critic.head(states)
            return value, at_taken(advantage, taken)

        read = critic.features(*inputs), action_ids
        value, advantage = chunked.in_chunks(
            scores_of, self.logits_chunk_size, *read, parameters=critic.head_parameters()
        )
        return value, advantage

    def token_values(self, *inputs: Tensor) -> TokenValues:
        """V(o) alone: the head's other outputs are fitted at whole actions only."""
        return at_prompt(super().token_values(*inputs))

    def utterance_q(
        self, critic: Critic, batch: TakenBatch | UtteranceBatch
    ) -> tuple[Tensor, Tensor]:
        """V(o) and Q(o, a) of a critic: [B], [B]."""
        value, advantage = self.scores(
            critic, batch.prompt_ids, batch.prompt_mask, batch.action_ids, batch.features
        )
        last = batch.action_mask.sum(1, keepdim=True) - 1
        return value[:, 0], (value + advantage).gather(1, last).squeeze(1)

    def credit(self, actions: Actions, taken: Taken, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Targets of Q(o, a); the advantages follow in `compute_targets`."""
        mask = actions.action_mask
        steps = episode_steps(actions, torch.ones_like(mask[:, :1]), rollout.num_envs, self.gamma)
        values = taken.values[:, :1]
        following = following_values(steps, values, self.bootstrap_values(actions, rollout))
        penalty = self.beta * ((taken.log_pi - taken.log_ref) * mask).sum(1, keepdim=True)
        targets = steps.rewards - pack(penalty, steps.layout) + steps.discounts * following
        targets = unpack(targets, steps.layout, like=values).expand_as(taken.values)
        return torch.zeros_like(taken.values), targets

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> UtteranceBatch:  # type: ignore[override]  # one field more
        batch = super().compute_targets(rollout)
        rows = torch.split(torch.arange(len(batch.weights)), self.forward_batch_size)
        parts = [
            self.utterance_q(self.target_critic, TakenBatch(*(field[r] for field in batch)))
            for r in rows
        ]
        value, q = (torch.cat(column) for column in zip(*parts, strict=True))
        whole = torch.ones_like(batch.action_mask[:, :1])
        credited = self.standardised((q - value)[:, None], whole).expand_as(batch.advantages)
        return UtteranceBatch(*batch._replace(advantages=credited), utterance_q=q)

    def critic_step(self, batch: UtteranceBatch) -> Tensor:  # type: ignore[override]
        """Mean over actions of the regression errors of Q(o, a) and V(o)."""
        value, q = self.utterance_q(self.critic, batch)
        every = torch.ones_like(q, dtype=torch.bool)
        losses = objectives.critic_loss(q, batch.returns[:, 0], every, "huber")
        losses = losses + objectives.critic_loss(value, batch.utterance_q, every, "huber")
        self.log_mean("train/critic_loss", losses.mean(), len(losses))
        return losses.mean()

    def on_train_epoch_end(self) -> None:
        polyak_update(self.target_critic, self.critic, self.tau)
