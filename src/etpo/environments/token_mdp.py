"""Enumerable MDPs whose actions are token sequences, with exact float64 solvers: the oracle.

Small enough (about 5 tokens, 3 per action, a few states) to list every action, prefix and episode.
Nothing here uses the training code, so that the two can be compared. Policies are tables
log pi(w | s, prefix) [S, P, V] with finite entries: S states, P prefixes (0 is the empty one),
V tokens, A actions. Solvers are differentiable with respect to the policy unless stated otherwise.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenTree(NamedTuple):
    """Every prefix and action of at most L tokens, prefixes ordered by length."""

    child: Tensor  # int64 [P, V], the prefix after this token, -1 where the action ends
    action: Tensor  # int64 [P, V], the action that this token completes, -1 where it goes on
    levels: list[slice]  # prefixes of length 0, 1, ..., L - 1
    paths: list[list[tuple[int, int]]]  # of each action: its (prefix, token) pairs in order


def token_tree(vocabulary_size: int, length: int, eos: bool) -> TokenTree:
    """Actions of exactly `length` tokens; with `eos`, token V - 1 ends an action before that."""
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
        """int64 [N, K], the token at the next prefix; meaningful where `continues`."""
        return F.pad(self.token[:, 1:], (0, 1))

    def probabilities(self, log_pi: Tensor) -> Tensor:
        """Probability of each episode under the policy [S, P, V] -> [N]; they sum to 1."""
        log_taken = log_pi[self.state, self.prefix, self.token]
        return self.probability * torch.where(self.valid, log_taken, 0.0).sum(1).exp()


@dataclass(frozen=True)
class TokenMDP:
    """Tables of the environment; the discount is gamma between actions and 1 inside them.

    The episode ends after action a in state s with probability termination[s, a], otherwise the
    next state is drawn from transitions[s, a]. Infinite sums need gamma (1 - termination) < 1 or
    transitions without a cycle.
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
        acyclic: bool = False,
    ) -> "TokenMDP":
        """A random instance: normal rewards, termination probabilities in [0.1, 0.4].

        `acyclic`: states only lead to later ones and the last one terminates, so that an episode
        has at most `num_states` actions and can be enumerated to its end.
        """
        rng = torch.Generator().manual_seed(seed)
        shape = (num_states, len(token_tree(vocabulary_size, length, eos).paths))
        rewards = torch.randn(shape, generator=rng, dtype=torch.float64)
        weights = torch.rand((*shape, num_states), generator=rng, dtype=torch.float64) + 0.01
        termination = 0.1 + 0.3 * torch.rand(shape, generator=rng, dtype=torch.float64)
        start = torch.rand(num_states, generator=rng, dtype=torch.float64) + 0.01
        if acyclic:
            later = torch.ones(num_states, num_states, dtype=torch.float64).triu(1)
            later[-1, -1] = 1.0  # never followed: the last state terminates
            weights = weights * later.unsqueeze(1)
            termination[-1] = 1.0
        transitions = weights / weights.sum(-1, keepdim=True)
        start = start / start.sum()
        return cls(vocabulary_size, length, eos, gamma, rewards, transitions, termination, start)

    @cached_property
    def tree(self) -> TokenTree:
        return token_tree(self.vocabulary_size, self.length, self.eos)

    @property
    def _continuation(self) -> Tensor:
        """gamma (1 - termination) transitions: [S, A, S]."""
        return self.gamma * (1 - self.termination).unsqueeze(-1) * self.transitions

    def random_policy(self, seed: int, scale: float = 1.0) -> Tensor:
        """log pi [S, P, V] of normal logits with this deviation."""
        rng = torch.Generator().manual_seed(seed)
        shape = (len(self.start), *self.tree.child.shape)
        logits = scale * torch.randn(shape, generator=rng, dtype=torch.float64)
        return logits.log_softmax(-1)

    def action_log_probs(self, log_pi: Tensor) -> Tensor:
        """log pi(a | s) of whole actions, the sum over their tokens: [S, P, V] -> [S, A]."""
        columns = []
        for path in self.tree.paths:
            prefixes, tokens = zip(*path, strict=True)
            columns.append(log_pi[:, list(prefixes), list(tokens)].sum(-1))
        return torch.stack(columns, dim=1)

    def solve_actions(self, log_ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Soft value iteration over all |A| actions by brute force, no tokens; beta > 0.

        Returns log pi*(a | s) [S, A] and V*(s) [S]. Raises RuntimeError without convergence.
        """
        prior = self.action_log_probs(log_ref)

        def sweep(value: Tensor) -> tuple[Tensor, Tensor]:
            # Q(s, a) = r + gamma (1 - termination) E[V(s')],  V = beta log sum_a ref exp(Q / beta)
            energy = prior + (self.rewards + self._continuation @ value) / beta
            return energy.log_softmax(-1), beta * energy.logsumexp(-1)

        return _fixed_point(sweep, torch.zeros_like(self.start))

    def solve_tokens(
        self, log_ref: Tensor, beta: float, token_discount: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Per-token soft value iteration; beta > 0.

        Returns log pi*(w | s, prefix) [S, P, V] and V*(s) [S]. `token_discount` multiplies the
        value of the next prefix inside an action: 1 is ETPO; gamma is the naive token-level MDP.
        Raises RuntimeError without convergence.
        """

        def sweep(value: Tensor) -> tuple[Tensor, Tensor]:
            leaf = self.rewards + self._continuation @ value
            q, v = self._backup(
                leaf,
                lambda q, level: beta * (log_ref[:, level] + q / beta).logsumexp(-1),
                token_discount,
            )
            return (log_ref + q / beta).log_softmax(-1), v[:, 0]

        return _fixed_point(sweep, torch.zeros_like(self.start))

    def evaluate(self, log_pi: Tensor, log_ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Exact soft Q^pi(s, prefix, w) [S, P, V] and V^pi(s, prefix) [S, P] by a linear solve."""
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
        """J(pi) = E[ sum_t gamma^t (r_t - beta KL(pi(.|s_t) || pi_ref(.|s_t))) ], a scalar."""
        return self.start @ self.evaluate(log_pi, log_ref, beta)[1][:, 0]

    def visitation(self, log_pi: Tensor) -> Tensor:
        """d(s, prefix) = sum_t gamma^t Pr(s_t = s and action t begins with prefix): [S, P]."""
        eye = torch.eye(len(self.start), dtype=log_pi.dtype)
        visits = [torch.linalg.solve((eye - self._state_matrix(log_pi)).T, self.start)]
        for prefix, row in enumerate(self.tree.child.tolist()):
            for token, child in enumerate(row):
                if child >= 0:  # children come in the order of their numbers
                    visits.append(visits[prefix] * log_pi[:, prefix, token].exp())
        return torch.stack(visits, dim=1)

    def enumerate_episodes(self, horizon: int) -> Episodes:
        """Every episode of positive probability, truncated after `horizon` actions.

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
        """(tokens as rows in the order of `Episodes`, environment probability) from a state on."""
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

    def _state_matrix(self, log_pi: Tensor) -> Tensor:
        """gamma times the probability to go on from s to s' under pi: [S, S]."""
        return torch.einsum("sa,sat->st", self.action_log_probs(log_pi).exp(), self._continuation)

    def _backup(
        self,
        leaf: Tensor,
        node_value: Callable[[Tensor, slice], Tensor],
        token_discount: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """From the values of complete actions [S, A] to q [S, P, V] and v [S, P], backwards.

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


def _fixed_point(
    sweep: Callable[[Tensor], tuple[Tensor, Tensor]], value: Tensor, tolerance: float = 1e-13
) -> tuple[Tensor, Tensor]:
    """Repeats value -> (log pi, value) until the value's largest relative move is `tolerance`."""
    for _ in range(5000):
        log_pi, updated = sweep(value)
        if (updated - value).abs().max() <= tolerance * updated.abs().max().clamp(min=1):
            return log_pi, updated
        value = updated
    raise RuntimeError("soft value iteration did not converge: need gamma (1 - termination) < 1")
