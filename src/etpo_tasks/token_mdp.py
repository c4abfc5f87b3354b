"""MDPs whose actions are token sequences, with exact float64 solvers.

They are small enough to enumerate every action and prefix. The solvers are independent of the
training code. Policies are tables log pi(w | s, prefix) [S, P, V] with finite entries: S states, P
prefixes (0 is the empty one), V tokens, A actions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor


class TokenTree(NamedTuple):
    """All prefixes and actions of at most L tokens, prefixes ordered by length."""

    child: Tensor  # int64 [P, V], the prefix after the token, -1 if the action ends
    action: Tensor  # int64 [P, V], the action completed by the token, -1 if it continues
    levels: list[slice]  # prefixes of length 0, 1, ..., L - 1
    paths: list[list[tuple[int, int]]]  # (prefix, token) pairs of each action, in order


def token_tree(vocabulary_size: int, length: int, eos: bool) -> TokenTree:
    """Build the tree of actions of `length` tokens; with `eos`, token V - 1 ends it early."""
    child, action, levels, paths = [], [], [], []
    frontier: list[list[tuple[int, int]]] = [[]]
    for depth in range(length):
        first, grown = len(child), []
        for prefix, path in enumerate(frontier, start=first):
            child.append([-1] * vocabulary_size)
            action.append([-1] * vocabulary_size)
            for token in range(vocabulary_size):
                longer = [*path, (prefix, token)]
                if depth == length - 1 or (eos and token == vocabulary_size - 1):
                    action[-1][token] = len(paths)
                    paths.append(longer)
                else:
                    child[-1][token] = first + len(frontier) + len(grown)
                    grown.append(longer)
        levels.append(slice(first, first + len(frontier)))
        frontier = grown
    return TokenTree(torch.tensor(child), torch.tensor(action), levels, paths)


@dataclass(frozen=True)
class TokenMDP:
    """Tables of the environment; the discount is gamma between actions and 1 inside them.

    The episode ends after action a in state s with probability termination[s, a]; otherwise
    transitions[s, a] is the distribution of the next state. Values are finite if
    gamma (1 - termination) < 1 or transitions have no cycle.
    """

    vocabulary_size: int
    length: int
    eos: bool
    gamma: float
    rewards: Tensor  # [S, A]
    transitions: Tensor  # [S, A, S], rows sum to 1
    termination: Tensor  # [S, A]
    start: Tensor  # [S], sums to 1

    @classmethod
    def random(
        cls,
        seed: int,
        vocabulary_size: int = 3,
        length: int = 2,
        num_states: int = 3,
        eos: bool = True,
        gamma: float = 0.9,
    ) -> Self:
        """Draw an instance: normal rewards, termination probabilities in [0.1, 0.4]."""
        rng = torch.Generator().manual_seed(seed)
        shape = (num_states, len(token_tree(vocabulary_size, length, eos).paths))
        rewards = torch.randn(shape, generator=rng, dtype=torch.float64)
        weights = torch.rand((*shape, num_states), generator=rng, dtype=torch.float64) + 0.01
        termination = 0.1 + 0.3 * torch.rand(shape, generator=rng, dtype=torch.float64)
        start = torch.rand(num_states, generator=rng, dtype=torch.float64) + 0.01
        transitions = weights / weights.sum(-1, keepdim=True)
        start = start / start.sum()
        return cls(vocabulary_size, length, eos, gamma, rewards, transitions, termination, start)

    @cached_property
    def tree(self) -> TokenTree:
        return token_tree(self.vocabulary_size, self.length, self.eos)

    @property
    def _continuation(self) -> Tensor:
        """Return gamma (1 - termination) transitions [S, A, S]."""
        return self.gamma * (1 - self.termination).unsqueeze(-1) * self.transitions

    def action_log_probs(self, log_pi: Tensor) -> Tensor:
        """Sum log pi over the tokens of each action: [S, P, V] -> log pi(a | s) [S, A]."""
        columns = []
        for path in self.tree.paths:
            prefixes, tokens = zip(*path, strict=True)
            columns.append(log_pi[:, list(prefixes), list(tokens)].sum(-1))
        return torch.stack(columns, dim=1)

    def solve_tokens(
        self, log_ref: Tensor, beta: float, token_discount: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Run per-token soft value iteration; beta > 0.

        Returns log pi*(w | s, prefix) [S, P, V] and V*(s) [S]. `token_discount` multiplies the
        value of the next prefix inside an action: 1 is ETPO; gamma is the naive token-level MDP.
        Raises RuntimeError if it does not converge.
        """

        def soft_value(q: Tensor, level: slice) -> Tensor:
            return beta * (log_ref[:, level] + q / beta).logsumexp(-1)

        def sweep(value: Tensor) -> tuple[Tensor, Tensor]:
            leaf = self.rewards + self._continuation @ value
            q, v = self._backup(leaf, soft_value, token_discount)
            return (log_ref + q / beta).log_softmax(-1), v[:, 0]

        return fixed_point(sweep, torch.zeros_like(self.start))

    def visitation(self, log_pi: Tensor) -> Tensor:
        """Compute sum_t gamma^t Pr(s_t = s and action t begins with prefix): [S, P]."""
        eye = torch.eye(len(self.start), dtype=log_pi.dtype)
        visits = [torch.linalg.solve((eye - self._state_matrix(log_pi)).T, self.start)]
        for prefix, row in enumerate(self.tree.child.tolist()):
            for token, child in enumerate(row):
                if child >= 0:  # children come in the order of their numbers
                    visits.append(visits[prefix] * log_pi[:, prefix, token].exp())
        return torch.stack(visits, dim=1)

    def _state_matrix(self, log_pi: Tensor) -> Tensor:
        """Return gamma times the probability to continue from s to s' under pi: [S, S]."""
        return torch.einsum("sa,sat->st", self.action_log_probs(log_pi).exp(), self._continuation)

    def _backup(
        self,
        leaf: Tensor,
        node_value: Callable[[Tensor, slice], Tensor],
        token_discount: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Compute q [S, P, V] and v [S, P] backwards from the values of actions `leaf` [S, A].

        `node_value` maps q [S, n, V] of the prefixes in a slice to their values [S, n].
        """
        q_levels: list[Tensor] = []
        v_levels: list[Tensor] = []
        for level in reversed(self.tree.levels):
            child, action = self.tree.child[level], self.tree.action[level]
            q = leaf[:, action.clamp(min=0)]
            if v_levels:
                following = v_levels[0][:, (child - level.stop).clamp(min=0)]
                q = torch.where(child >= 0, token_discount * following, q)
            q_levels.insert(0, q)
            v_levels.insert(0, node_value(q, level))
        return torch.cat(q_levels, dim=1), torch.cat(v_levels, dim=1)


def fixed_point(
    sweep: Callable[[Tensor], tuple[Tensor, Tensor]], value: Tensor, tolerance: float = 1e-13
) -> tuple[Tensor, Tensor]:
    """Iterate value -> (log pi, value) until the largest relative change is `tolerance`."""
    for _ in range(5000):
        log_pi, updated = sweep(value)
        if (updated - value).abs().max() <= tolerance * updated.abs().max().clamp(min=1):
            return log_pi, updated
        value = updated
    raise RuntimeError("soft value iteration did not converge: need gamma (1 - termination) < 1")
