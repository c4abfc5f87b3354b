"""`TokenMDP` with what only tests need: enumeration, evaluation and brute-force solutions."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from etpo.environments import token_mdp
from etpo.environments.token_mdp import fixed_point


class Episodes(NamedTuple):
    """Token sequences of N episodes, padded on the right with zeros; [N, K] unless stated."""

    state: Tensor  # int64
    prefix: Tensor  # int64
    token: Tensor  # int64
    step: Tensor  # int64, t: number of the action in its episode, from 0
    next_state: Tensor  # int64, of the next prefix; 0 after a termination
    next_prefix: Tensor  # int64
    rewards: Tensor  # float64, the action's reward at its last token, 0 elsewhere
    discounts: Tensor  # float64, 1 inside an action, gamma (1 - terminated) at its last token
    continues: Tensor  # bool, the next token of the episode is in the data
    valid: Tensor  # bool
    probability: Tensor  # float64 [N], start, transitions and terminations: the environment's part

    @property
    def next_token(self) -> Tensor:
        """Return the token at the next prefix, int64 [N, K]; meaningful where `continues`."""
        return F.pad(self.token[:, 1:], (0, 1))

    def probabilities(self, log_pi: Tensor) -> Tensor:
        """Compute the probability of each episode under a policy, [S, P, V] -> [N]; sum 1."""
        log_taken = log_pi[self.state, self.prefix, self.token]
        return self.probability * torch.where(self.valid, log_taken, 0.0).sum(1).exp()


class TokenMDP(token_mdp.TokenMDP):
    """An MDP that can be enumerated and evaluated exactly."""

    @classmethod
    def of(cls, mdp: token_mdp.TokenMDP) -> "TokenMDP":
        """Return the same MDP with these methods."""
        return cls(**{field.name: getattr(mdp, field.name) for field in fields(mdp)})

    @classmethod
    def random(cls, *args, acyclic: bool = False, **kwargs) -> "TokenMDP":
        """Draw an instance.

        `acyclic`: states only lead to later ones and the last one terminates, so that an episode
        has at most `num_states` actions and can be enumerated to its end.
        """
        mdp = super().random(*args, **kwargs)
        if acyclic:
            later = torch.ones_like(mdp.transitions[:, 0]).triu(1)
            later[-1, -1] = 1.0  # never followed: the last state terminates
            mdp.transitions.mul_(later.unsqueeze(1))
            mdp.transitions.div_(mdp.transitions.sum(-1, keepdim=True))
            mdp.termination[-1] = 1.0
        return mdp

    def random_policy(self, seed: int, scale: float = 1.0) -> Tensor:
        """Return log pi [S, P, V] of normal logits with deviation `scale`."""
        rng = torch.Generator().manual_seed(seed)
        shape = (len(self.start), *self.tree.child.shape)
        logits = scale * torch.randn(shape, generator=rng, dtype=torch.float64)
        return logits.log_softmax(-1)

    def solve_actions(self, log_ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Run soft value iteration over all |A| actions by brute force, no tokens; beta > 0.

        Returns log pi*(a | s) [S, A] and V*(s) [S]. Raises RuntimeError without convergence.
        """
        prior = self.action_log_probs(log_ref)

        def sweep(value: Tensor) -> tuple[Tensor, Tensor]:
            # Q(s, a) = r + gamma (1 - termination) E[V(s')],  V = beta log sum_a ref exp(Q / beta)
            energy = prior + (self.rewards + self._continuation @ value) / beta
            return energy.log_softmax(-1), beta * energy.logsumexp(-1)

        return fixed_point(sweep, torch.zeros_like(self.start))

    def evaluate(self, log_pi: Tensor, log_ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Solve for the soft Q^pi(s, prefix, w) [S, P, V] and V^pi(s, prefix) [S, P]."""
        log_action = self.action_log_probs(log_pi)
        kl = (log_action.exp() * (log_action - self.action_log_probs(log_ref))).sum(-1)
        reward = (log_action.exp() * self.rewards).sum(-1)
        eye = torch.eye(len(self.start), dtype=reward.dtype)
        # V = r_pi - beta KL + gamma P_pi V
        value = torch.linalg.solve(eye - self._state_matrix(log_pi), reward - beta * kl)
        return self._backup(
            self.rewards + self._continuation @ value,
            lambda q, level: (
                log_pi[:, level].exp() * (q - beta * (log_pi - log_ref)[:, level])
            ).sum(-1),
        )

    def regularized_return(self, log_pi: Tensor, log_ref: Tensor, beta: float) -> Tensor:
        """Compute J(pi) = E[ sum_t gamma^t (r_t - beta KL(pi || pi_ref)(s_t)) ], a scalar."""
        return self.start @ self.evaluate(log_pi, log_ref, beta)[1][:, 0]

    def enumerate_episodes(self, horizon: int) -> Episodes:
        """List every episode of positive probability, truncated after `horizon` actions.

        An episode that is still open then bootstraps: discount gamma, a true next state, and no
        continuation.
        """
        rows = []
        for state, probability in enumerate(self.start.tolist()):
            rows += self._unroll(state, 0, horizon, probability)
        width = max(len(tokens) for tokens, _ in rows)
        padding = (0,) * (len(Episodes._fields) - 1)
        table = torch.tensor(
            [tokens + [padding] * (width - len(tokens)) for tokens, _ in rows],
            dtype=torch.float64,
        )
        columns = table.unbind(-1)
        return Episodes(
            *(column.long() for column in columns[:6]),
            *columns[6:8],
            *(column.bool() for column in columns[8:]),
            torch.tensor([probability for _, probability in rows], dtype=torch.float64),
        )

    def _unroll(
        self, state: int, step: int, horizon: int, probability: float
    ) -> Iterator[tuple[list[tuple[float, ...]], float]]:
        """Yield (tokens as rows of `Episodes`, environment probability) from a state on."""
        for action, path in enumerate(self.tree.paths):
            inside = [
                (state, prefix, token, step, state, following, 0.0, 1.0, 1, 1)
                for (prefix, token), (following, _) in pairwise(path)
            ]
            end = (state, *path[-1], step)
            reward = self.rewards[state, action].item()
            stop = self.termination[state, action].item()
            if stop > 0:
                last = (*end, 0, 0, reward, 0.0, 0, 1)
                yield [*inside, last], probability * stop
            for following, chance in enumerate(self.transitions[state, action].tolist()):
                through = probability * (1 - stop) * chance
                goes_on = step + 1 < horizon
                last = (*end, following, 0, reward, self.gamma, int(goes_on), 1)
                if through == 0:
                    continue
                if not goes_on:
                    yield [*inside, last], through
                    continue
                for tail, tail_probability in self._unroll(following, step + 1, horizon, through):
                    yield [*inside, last, *tail], tail_probability
