"""Window of earlier iterations whose actions are trained on again."""

from collections import deque
from typing import Any

from torch import Tensor

from etpo.rollout.types import Actions, Decisions, Rollout, pad_stack, stack

Replayed = tuple[Actions, Decisions | None, Tensor]  # actions, next decisions and log mu


class ReplayWindow:
    """Actions of the last `size` - 1 iterations, without hidden states.

    The policy, reference and critic of a later iteration evaluate them again. Kept on the CPU.
    """

    def __init__(self, size: int, num_envs: int) -> None:
        self.num_envs = num_envs
        self.past: deque[Replayed] = deque(maxlen=size - 1)

    def extended(self, fresh: Rollout, pad_id: int) -> Rollout:
        """Return a rollout of the fresh actions, then the replayed ones, the latest first."""
        if self.past and len(self.past[0][0].rewards) != len(fresh.actions.rewards):
            self.past.clear()  # a resumed run with other sizes
        if not self.past:
            return fresh
        actions, bootstraps, log_mu = zip(*reversed(self.past), strict=True)
        decisions = [each for each in (fresh.bootstrap, *bootstraps) if each is not None]
        joined = stack([without_states(fresh.actions), *actions], pad_id)
        length = joined.action_ids.shape[1]
        first = fresh.actions.rewards.new_zeros(0, length)
        return fresh._replace(
            actions=joined,
            bootstrap=stack(decisions, pad_id) if decisions else None,
            replayed_log_mu=pad_stack([first, *log_mu], 0.0, left=False),
        )

    def append(self, fresh: Rollout, log_mu: Tensor) -> None:
        """Add an iteration and drop the oldest one; log_mu: [B, L] of the fresh actions."""
        if self.past.maxlen:
            width = fresh.actions.action_ids.shape[1]
            log_mu = log_mu[: fresh.num_fresh, :width].cpu()
            self.past.append((without_states(fresh.actions), fresh.bootstrap, log_mu))

    def state_dict(self) -> dict[str, Any]:
        """Return the window as lists and dictionaries of tensors."""
        past = [
            {
                "actions": actions._asdict(),
                "bootstrap": None if bootstrap is None else bootstrap._asdict(),
                "log_mu": log_mu,
            }
            for actions, bootstrap, log_mu in self.past
        ]
        return {"num_envs": self.num_envs, "past": past}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the window; a smaller one keeps the latest iterations.

        With another number of environments the rows belong to other trajectories: it stays empty.
        """
        if state["num_envs"] != self.num_envs:
            return
        for each in state["past"]:
            bootstrap = each["bootstrap"]
            decisions = None if bootstrap is None else Decisions(**bootstrap)
            self.past.append((Actions(**each["actions"]), decisions, each["log_mu"]))


def without_states(actions: Actions) -> Actions:
    """Return the actions without what the present policy computes again."""
    hidden, support = actions.hidden_states, actions.support
    return actions._replace(hidden_states=hidden[..., :0], support=support[..., :0])
