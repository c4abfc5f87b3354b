"""A `TokenMDP` as an ordinary text environment, so that what is trained can be solved exactly.

Token i < V - 1 is the letter i, the last token is the end of the action, which no text shows. So
"" is the action of the end token alone, "ab" is a, b, end, and a text of `length` letters was cut
at the length limit. What the letters spell in an observation is the number of the state.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import product
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from etpo.environments.text_env import Step, TextObservation, TextVectorEnv
from etpo.environments.token_mdp import TokenMDP
from etpo.errors import MAX_SEED, ConfigError, check_integer, check_range

VOCABULARY_SIZES = (3, len(ascii_lowercase) + 1)  # two letters at least, and the end token
MAX_STATES = 100
MAX_TEXTS = 1000  # of the largest length; the tables have S x A x S entries
MAX_LENGTH = 9  # of two letters


def letters(vocabulary_size: int) -> str:
    """The letters of the tokens 0 to V - 2."""
    return ascii_lowercase[: vocabulary_size - 1]


def action_texts(mdp: TokenMDP) -> list[str]:
    """The text of each of the MDP's A actions, in its order."""
    alphabet = letters(mdp.vocabulary_size)
    return ["".join(alphabet[t] for _, t in path if t < len(alphabet)) for path in mdp.tree.paths]


def state_texts(mdp: TokenMDP) -> list[str]:
    """The text of each of the MDP's S states: its number in letters, all of one width."""
    alphabet, count = letters(mdp.vocabulary_size), len(mdp.start)
    width = next(w for w in range(1, count + 1) if len(alphabet) ** w >= count)
    return ["".join(text) for text in product(alphabet, repeat=width)][:count]


def random_mdp(
    *,
    seed: int,
    num_states: int,
    vocabulary_size: int,
    length: int,
    rewards: Sequence[Mapping[str, float]] | None = None,
) -> TokenMDP:
    """Random transitions, terminations and start; rewards too, unless they are given.

    seed: draws the tables, apart from the run's seed. vocabulary_size: letters and the end token.
    length: most tokens of an action. rewards: one mapping per state from an action's text to its
    reward; actions that it does not name pay 0. Raises ConfigError for values out of range.
    """
    check_integer("environment.mdp.seed", seed, 0, MAX_SEED)
    check_integer("environment.mdp.num_states", num_states, 1, MAX_STATES)
    check_integer("environment.mdp.vocabulary_size", vocabulary_size, *VOCABULARY_SIZES)
    check_integer("environment.mdp.length", length, 1, MAX_LENGTH)
    if (vocabulary_size - 1) ** length > MAX_TEXTS:
        raise ConfigError(
            f"environment.mdp.length={length}: allowed with {vocabulary_size - 1} letters is a "
            f"length that has at most {MAX_TEXTS} texts"
        )
    mdp = TokenMDP.random(seed, vocabulary_size, length, num_states)
    return mdp if rewards is None else replace(mdp, rewards=reward_table(mdp, rewards))


def reward_table(mdp: TokenMDP, rewards: Sequence[Mapping[str, float]]) -> torch.Tensor:
    """float64 [S, A] of one mapping per state; ConfigError where they do not fit `mdp`."""
    key, texts = "environment.mdp.rewards", action_texts(mdp)
    if not isinstance(rewards, Sequence) or len(rewards) != len(mdp.start):
        raise ConfigError(
            f"{key}={rewards}: allowed is a list of {len(mdp.start)} mappings, one per state"
        )
    table = torch.zeros_like(mdp.rewards)
    for state, row in enumerate(rewards):
        if not isinstance(row, Mapping):
            raise ConfigError(f"{key}[{state}]={row}: allowed is a mapping from text to reward")
        for text, reward in row.items():
            if text not in texts:
                raise ConfigError(
                    f"{key}[{state}]: no action {text!r}; allowed are texts of at most "
                    f"{mdp.length} letters of {letters(mdp.vocabulary_size)}"
                )
            check_range(f"{key}[{state}].{text}", reward, -1e6, 1e6)
            table[state, texts.index(text)] = reward
    return table


class TokenMDPEnv(TextVectorEnv):
    """`num_envs` copies of an MDP whose actions are texts of at most `mdp.length` letters.

    Letters beyond `mdp.length` are not read: with the end token in the vocabulary, texts of at
    most that length and actions are the same thing. A text with any other character is a failure:
    it is paid the lowest reward of the tables and ends the episode. A language model whose
    vocabulary is the MDP's (`model=token_mdp`) can write no such text.

    time_limit: number of actions after which an episode is truncated, or None. It is no part of
    the task: observations do not show it and what follows is bootstrapped.

    All draws come from the generator that `reset(seed=...)` seeds. Raises ConfigError for values
    out of range.
    """

    task_name = "token_mdp"

    def __init__(self, *, mdp: TokenMDP, num_envs: int = 1, time_limit: int | None = None) -> None:
        check_integer("environment.num_envs", num_envs, 1)
        if time_limit is not None:
            check_integer("environment.time_limit", time_limit, 1)
        self.mdp, self.num_envs, self.time_limit = mdp, num_envs, time_limit
        self.alphabet = letters(mdp.vocabulary_size)
        self.actions = {text: action for action, text in enumerate(action_texts(mdp))}
        self.observations = [self.observe(text) for text in state_texts(mdp)]
        self.rewards, self.termination = mdp.rewards.numpy(), mdp.termination.numpy()
        # a state is drawn by comparing a uniform number with these sums
        self.start, self.following = mdp.start.cumsum(0).numpy(), mdp.transitions.cumsum(-1).numpy()
        self.single_action_space = spaces.Text(mdp.length, min_length=0, charset=self.alphabet)
        text = spaces.Text(200, min_length=0)
        self.single_observation_space = spaces.Dict(
            {key: deepcopy(text) for key in TextObservation.__annotations__}
        )
        self.action_space, self.observation_space = (
            spaces.Tuple([deepcopy(space) for _ in range(num_envs)])
            for space in (self.single_action_space, self.single_observation_space)
        )

    def observe(self, state: str) -> TextObservation:
        """What an agent reads in a state."""
        request = f"State {state}. Answer with at most {self.mdp.length} letters of {self.alphabet}"
        return TextObservation(instruction=request, prefix=state, suffix="")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[TextObservation, ...], dict[str, Any]]:
        """Open a new episode in every environment, from a start state."""
        super().reset(seed=seed)
        self._states = self._draw(np.tile(self.start, (self.num_envs, 1)))
        self._attempts = np.zeros(self.num_envs, dtype=np.int64)
        return tuple(self.observations[state] for state in self._states), {}

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """One transition of each of `envs`; what is returned is told in `TextVectorEnv`."""
        count = len(envs)
        errors = [self.error(action) for action in actions]
        failed = np.array([error is not None for error in errors])
        # a failure takes the place of action 0 until its reward and its end are set
        texts = ["" if error else a for a, error in zip(actions, errors, strict=True)]
        taken = self._states[envs], np.array([self.actions[t[: self.mdp.length]] for t in texts])
        rewards = np.where(failed, self.rewards.min(), self.rewards[taken])
        terminations = failed | (self.np_random.random(count) < self.termination[taken])
        states = self._draw(self.following[taken])
        self._attempts[envs] += 1
        truncations = np.zeros(count, dtype=bool)
        if self.time_limit is not None:
            truncations = ~terminations & (self._attempts[envs] >= self.time_limit)
        infos = {
            "final_obs": np.full(count, None, dtype=object),
            "error": np.array(errors, dtype=object),
            "attempt": self._attempts[envs],
            "cached": np.zeros(count, dtype=bool),
        }
        ended = np.flatnonzero(terminations | truncations)
        for row in ended:
            infos["final_obs"][row] = self.observations[states[row]]
        states[ended] = self._draw(np.tile(self.start, (len(ended), 1)))
        self._states[envs], self._attempts[envs[ended]] = states, 0
        observations = tuple(self.observations[state] for state in states)
        return observations, rewards, terminations, truncations, infos

    def error(self, action: str) -> str | None:
        """Why a text is no action, or None."""
        strange = next((c for c in action if c not in self.alphabet), None)
        return None if strange is None else f"{strange!r} is none of the letters {self.alphabet}"

    def _draw(self, sums: np.ndarray) -> np.ndarray:
        """States [n] from cumulative probabilities [n, S]; sums[:, -1] is 1 up to rounding."""
        below = self.np_random.random((len(sums), 1)) >= sums[:, :-1]
        return below.sum(1)
