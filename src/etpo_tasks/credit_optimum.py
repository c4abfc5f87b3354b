"""Exact soft optimum of the credit suite by dynamic programming, and a run's share of it."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from lightning import Callback, LightningModule, Trainer

from etpo.callbacks.ranks import gather
from etpo.errors import ConfigError
from etpo_tasks.credit_suite import CreditSuiteEnv, Dials


class Optimum(NamedTuple):
    """Numbers of one episode, in reward.

    value: V*, the largest discounted return with its KL penalty. reward: expected sum of rewards,
    without discount and penalty, of the policy that attains V*. uniform: the same of uniform play.
    """

    value: float
    reward: float
    uniform: float


class Branch(NamedTuple):
    """Letters with one outcome: their share under uniform play, and what follows."""

    probability: float
    after: np.ndarray  # float64 [3], the fields of `Optimum` from here on


@lru_cache
def solve(dials: Dials, beta: float, gamma: float) -> Optimum:
    """Compute the optimum against the uniform reference over the k letters, in float64.

    The discount is gamma between actions and 1 inside them. Cues and noise do not matter: every
    cue permutes the letters. Free letters do not matter: their soft value is a constant 0. The
    states are therefore (turn, deciding letter, whether the episode can still earn).

    beta: KL coefficient >= 0; 0 is the optimum without penalty.
    """
    d, count = dials, dials.deciding_tokens
    share, paydays = 1 / (d.turns * count), d.paydays
    discount = np.array([gamma, 1.0, 1.0])
    is_open = lost = np.zeros(3)  # after the last turn
    for turn in reversed(range(d.turns)):
        # a right letter of an open episode earns now and is paid later
        earned = np.array([gamma ** (paydays[turn] - turn), 1.0, 1.0]) * share
        is_open, lost = discount * is_open, discount * lost
        if d.all_or_nothing and turn == paydays[turn]:
            is_open = is_open + np.count_nonzero(paydays == turn) / d.turns
        for place in reversed(range(count)):
            lure = d.distractor if place == 0 else 0.0
            worth, after_wrong = (0.0, lost) if d.all_or_nothing else (earned, is_open)
            is_open = node(branches(d, worth + is_open, after_wrong, lure, lost), beta)
            lost = node(branches(d, lost, lost, lure, lost), beta)
    return Optimum(*map(float, is_open))


def branches(
    dials: Dials, right: np.ndarray, wrong: np.ndarray, lure: float, lost: np.ndarray
) -> list[Branch]:
    """Return the outcomes of a deciding letter.

    Args:
        right, wrong: What follows the right letter and the others.
        lure: Reward of the distractor, 0 without one.
        lost: What follows the distractor.
    """
    each, others = 1 / dials.letters, dials.letters - 1 - (lure > 0)
    found = [Branch(each, right)]
    if others:
        found.append(Branch(others * each, wrong))
    if lure > 0:
        found.append(Branch(each, lure + lost))
    return found


def node(outcomes: list[Branch], beta: float) -> np.ndarray:
    """Back up the fields of `Optimum` through one token with the soft-optimal distribution."""
    reference = np.array([branch.probability for branch in outcomes])
    after = np.stack([branch.after for branch in outcomes])
    q = after[:, 0]
    if beta > 0:
        weights = reference * np.exp((q - q.max()) / beta)
        value = q.max() + beta * np.log(weights.sum())
    else:
        weights, value = reference * (q == q.max()), q.max()
    optimal = weights / weights.sum()
    return np.array([value, optimal @ after[:, 1], reference @ after[:, 2]])


class OptimumFraction(Callback):
    """Log the mean episode reward on a scale from uniform play, 0, to the soft optimum, 1.

    - `suite/optimum`: reward per episode of the soft-optimal policy for the iteration's beta.
    - `suite/fraction`: (reward per episode - uniform play) / (optimum - uniform play), of the
      iteration's sampled actions, before the update. It exceeds 1 where the policy pays more KL
      than the optimum does.

    A run is solved when the mean of `window` iterations in a row reaches `solved_at`. It ends
    `extra_iterations` later, as a finished run.

    Raises:
        ConfigError: iterations do not consist of whole episodes.
    """

    def __init__(self, solved_at: float = 0.9, window: int = 3, extra_iterations: int = 2) -> None:
        self.solved_at, self.window, self.extra_iterations = solved_at, window, extra_iterations
        self.fractions: list[float] = []  # of the run's iterations

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        environment: CreditSuiteEnv = trainer.datamodule.environment
        data, unit = trainer.datamodule, environment.num_envs * environment.dials.turns
        unit *= trainer.world_size
        if data.actions_per_iteration % unit:
            raise ConfigError(
                f"rollout.actions_per_iteration={data.actions_per_iteration}: allowed are "
                f"multiples of {unit}, whole episodes of all environments"
            )
        self.fractions = self.fractions[: trainer.current_epoch]
        self.limit(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx > 0:
            return
        records = trainer.datamodule.rollout.records
        played = gather((sum(r.reward for r in records), sum(r.attempt == 1 for r in records)))
        reward = sum(total for total, _ in played) / sum(episodes for _, episodes in played)
        dials = trainer.datamodule.environment.dials
        optimum = solve(dials, pl_module.beta, pl_module.settings.gamma)
        self.fractions.append((reward - optimum.uniform) / (optimum.reward - optimum.uniform))
        numbers = {"optimum": optimum.reward, "fraction": self.fractions[-1]}
        for name, number in numbers.items():
            pl_module.log(f"suite/{name}", number, on_step=False, on_epoch=True, batch_size=1)
        self.limit(trainer)

    def limit(self, trainer: Trainer) -> None:
        """End the run `extra_iterations` after the iteration in which it was solved."""
        solved = solved_iteration(self.fractions, self.solved_at, self.window)
        if solved is not None:
            last, limit = solved + 1 + self.extra_iterations, trainer.max_epochs
            trainer.fit_loop.max_epochs = last if limit in (None, -1) else min(last, limit)

    def state_dict(self) -> dict[str, Any]:
        return {"fractions": self.fractions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fractions = list(state_dict["fractions"])


def solved_iteration(fractions: list[float], solved_at: float, window: int) -> int | None:
    """Return the first iteration that ends `window` ones with a mean of `solved_at`, or None."""
    for last in range(window, len(fractions) + 1):
        if np.mean(fractions[last - window : last]) >= solved_at:
            return last - 1
    return None
