"""Candidate cures for ETPO's collapse that the default does without; docs/studies/stability.md.

Each differs from `ETPO` in one thing, so that a study can tell what that thing buys.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etpo.algorithms import objectives, soft_bellman
from etpo.algorithms.etpo import ETPO, TokenBatch
from etpo.errors import ConfigError, check_integer, check_range
from etpo.models.backbone import Backbone
from etpo.models.critics import Critic, DuelingHead
from etpo.rollout.episode import Rollout


class TwinHead(nn.Module):
    """Two dueling heads on the same features: (value, advantage) of the first, of the second."""

    def __init__(self, feature_size: int, vocabulary_size: int, hidden_size: int) -> None:
        super().__init__()
        sizes = feature_size, vocabulary_size, hidden_size
        self.heads = nn.ModuleList(DuelingHead(*sizes) for _ in range(2))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return (*self.heads[0](features), *self.heads[1](features))


class TwinETPO(ETPO):
    """Q is the smaller one of two heads, token by token (arXiv 1802.09477)."""

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        critic: Callable[..., Critic],
        *args: Any,
        **shared: Any,
    ) -> None:
        def twins(source: Backbone) -> Critic:
            return critic(source, head=TwinHead)

        super().__init__(backbone, twins, *args, **shared)

    def heads_of(self, outputs: tuple[Tensor, ...], log_pi: Tensor) -> tuple[Tensor, ...]:
        first_value, first, second_value, second = outputs
        return (
            objectives.dueling_q(first_value, first, log_pi),
            objectives.dueling_q(second_value, second, log_pi),
        )

    def values_of(self, outputs: tuple[Tensor, ...], log_pi: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.minimum(*self.heads_of(outputs, log_pi))
        return soft_bellman.expectation(log_pi, q), q


class WindowETPO(ETPO):
    """The critic is fitted to the last `window` >= 1 iterations' actions and returns.

    Half of its loss is that of one of these iterations, in turn. Their returns are those of their
    own time: off-policy by so much. A resumed run begins with an empty window.
    """

    def __init__(self, *args: Any, window: int, **shared: Any) -> None:
        check_integer("algorithm.window", window, 1)
        chunk = shared.get("vocabulary_chunk")
        if chunk is not None:
            raise ConfigError(
                f"algorithm.vocabulary_chunk={chunk}: allowed is null beside algorithm.window, "
                "since earlier policies' output layers are not kept"
            )
        super().__init__(*args, **shared)
        self.earlier: deque[TokenBatch] = deque(maxlen=window)
        self.turn = 0

    def annotate(self, rollout: Rollout) -> TokenBatch:
        batch = super().annotate(rollout)
        self.earlier.append(batch)
        return batch

    def critic_step(self, batch: TokenBatch) -> Tensor:
        loss = super().critic_step(batch)
        if len(self.earlier) < 2:
            return loss
        self.turn = (self.turn + 1) % len(self.earlier)  # the fresh one too comes round
        return (loss + super().critic_step(self.earlier[self.turn])) / 2


class WarmUpETPO(ETPO):
    """The policy rests for the first `warm_up` >= 0 iterations, in which the critic is fitted."""

    def __init__(self, *args: Any, warm_up: int, **shared: Any) -> None:
        check_integer("algorithm.warm_up", warm_up, 0)
        super().__init__(*args, **shared)
        self.warm_up = warm_up

    def on_train_epoch_start(self) -> None:
        self.policy_stopped = self.current_epoch < self.warm_up


class AdaptiveBetaETPO(ETPO):
    """beta follows the KL to the reference, in nats per action, to `target_kl` > 0.

    After each iteration beta *= 1 + 0.2 clip(KL / target - 1, -1, 1), for iterations of 64 actions.
    The form is that of arXiv 1909.08593, section 2.2, which clips and steps less: 0.2 and 0.1.
    """

    beta_factor: Tensor

    def __init__(self, *args: Any, target_kl: float, **shared: Any) -> None:
        check_range("algorithm.target_kl", target_kl, 0, float("inf"), above=True)
        super().__init__(*args, **shared)
        self.target_kl = target_kl
        self.register_buffer("beta_factor", torch.ones(()))

    @property
    def beta(self) -> float:
        return super().beta * float(self.beta_factor)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        kl = self.mean_over_ranks(torch.tensor(self.rollout_metrics["rollout/kl_to_reference"]))
        self.beta_factor *= 1 + 0.2 * (kl / self.target_kl - 1).clamp(-1, 1).to(self.device)


class JointClipETPO(ETPO):
    """One limit on the gradient norm of policy and critic together."""

    def clipped_together(self, optimizer: Optimizer) -> dict[str, list[nn.Parameter]]:
        return {"all": [p for group in optimizer.param_groups for p in group["params"]]}
