"""ArCHer: a critic of whole actions and a policy gradient of tokens (arXiv 2402.19446)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etpo.algorithms import losses, returns
from etpo.algorithms.base import Metrics, OnPolicyAlgorithm
from etpo.algorithms.evaluation import PrefixValues, values_of_first
from etpo.algorithms.policy_gradient import (
    clipped_steps,
    policy_gradient_batch,
    standardized,
    surrogate_loss,
)
from etpo.algorithms.settings import PolicyGradientSettings, bounded
from etpo.errors import ConfigError
from etpo.models.chunked_logits import in_chunks
from etpo.models.critic_heads import DuelingHead
from etpo.models.critics import WITH_HEAD, Critic, LanguageModelCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prefix_tree import PrefixTree, first_step
from etpo.models.token_columns import TokenColumns
from etpo.rollout.trajectories import (
    from_trajectories,
    next_values,
    to_trajectories,
    trajectory_steps,
)
from etpo.rollout.types import PrefixStates, Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ArCHerSettings(PolicyGradientSettings):
    """Settings of `ArCHer` in addition to `PolicyGradientSettings`.

    Args:
        tau: Polyak step of the target critic after each iteration; 1 copies the critic.
    """

    tau: float = bounded(1.0, 0, 1, above=True)


class ArCHer(OnPolicyAlgorithm):
    """Train Q(o, a) and V(o) of whole actions; every token gets the advantage Q(o, a) - V(o).

    One network computes both: V(o) is the value of the dueling head at the prompt, Q(o, a) its Q of
    the last token. The target critic computes the targets, r + gamma V(o') for Q and Q(o, a) for V
    (equations 2 and 3 of the paper, without its replay buffer). The reward includes the KL penalty
    -beta log(pi/pi_ref) of the action.

    Raises:
        ConfigError: the critic has no value head.
    """

    settings_class = ArCHerSettings
    critic_head = DuelingHead
    has_target_critic = True
    critic: Critic

    def __init__(self, policy: LanguageModelPolicy, critic: Critic, *options: Any) -> None:
        if isinstance(critic, LanguageModelCritic):
            raise ConfigError(f"critic=lm_copy: allowed are {', '.join(WITH_HEAD)}")
        super().__init__(policy, critic, *options)

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> TokenBatch:
        actions, old = self.start_iteration(rollout)
        mask, whole = actions.step_mask, actions.action_mask[:, :1]  # every action has a token
        steps = trajectory_steps(actions, whole, rollout.num_envs, self.settings.gamma)
        log_pi, log_ref = (
            to_trajectories(x.sum(1, keepdim=True), steps.layout) for x in (old.log_pi, old.log_ref)
        )
        first = old.value.gather(1, first_step(mask))
        values = to_trajectories(first, steps.layout)
        following = next_values(steps, values, self.bootstrap_values(rollout))
        rewards = returns.kl_penalized_rewards(
            steps.rewards, log_pi, log_ref, self.beta, steps.layout.valid
        )
        targets = from_trajectories(rewards + steps.discounts * following, steps.layout, like=first)
        value, q = self.action_values(self.target_critic, old.tree, old.states)
        advantages = standardized(self, (q - value)[:, None], whole)
        ratios = torch.ones_like(advantages)  # no actions are replayed
        outputs = advantages, targets, ratios, mask
        batch = policy_gradient_batch(self, rollout, actions, old, *outputs)
        return batch._replace(action_values=q)

    def scores(
        self, critic: Critic, tree: PrefixTree, states: PrefixStates
    ) -> tuple[Tensor, Tensor]:
        """Compute values of the prefixes [N] and advantages of the taken tokens [N, C]."""

        def of_hidden(hidden: Tensor, taken: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
            columns = TokenColumns.of(self.policy.vocabulary_size, support)
            value, advantage = critic.head(hidden, columns.ids)
            return value, advantage.gather(-1, columns.places(taken))

        inputs = critic.hidden_states(tree, states.ref, states.old), tree.taken, states.support
        value, advantage = in_chunks(of_hidden, self.settings.logits_chunk_size, *inputs)
        return value, advantage

    def prefix_values(self, tree: PrefixTree, states: PrefixStates) -> Tensor:
        return self.scores(self.target_critic, tree, states)[0]

    def action_values(
        self, critic: Critic, tree: PrefixTree, states: PrefixStates
    ) -> tuple[Tensor, Tensor]:
        """Evaluate V(o) and Q(o, a) of a critic: [B] each."""
        value, advantage = self.scores(critic, tree, states)
        q = tree.of_tokens(value) + tree.of_taken(advantage)
        last = tree.mask.shape[1] - 1 - first_step(tree.mask.flip(1))
        return tree.of_first(value), q.gather(1, last).squeeze(1)

    def critic_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Average the regression losses of Q(o, a) and V(o) over actions."""
        assert batch.action_values is not None
        value, q = self.action_values(self.critic, batch.tree, batch.states)
        every = torch.ones_like(q, dtype=torch.bool)
        each = losses.critic_loss(q, batch.returns[:, 0], every, "huber")
        each = each + losses.critic_loss(value, batch.action_values, every, "huber")
        return each.mean(), {"train/critic_loss": (each.mean(), len(each))}

    def policy_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Sum the clipped surrogate over tokens and average it over actions."""
        log_pi, log_mass = self.taken_log_probs(batch)
        steps = clipped_steps(self.settings, log_pi, batch.old_log_probs, batch.advantages)
        return surrogate_loss(batch, log_pi, log_mass, *steps, self.settings.truncation_kl_coef)

    def loss_values(self, tree: PrefixTree, states: PrefixStates, *_: Any) -> PrefixValues:
        # V is trained before the first step only
        return PrefixValues(values_of_first(tree, self.prefix_values(tree, states)))
