"""A `TokenMDP` as a text environment: a training task with a known optimum.

Token i < V - 1 is letter i; the last token ends the action and has no text. The text "" is the end
token alone, "ab" is a, b, end, and a text of `length` letters has no end token. The letters of an
observation encode the number of the state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from etpo.environments.text_env import Step, TextObservation, TextVectorEnv
from etpo.errors import MAX_SEED, ConfigError, check_integer, check_range
from etpo_tasks.token_mdp import TokenMDP

VOCABULARY_SIZES = (3, len(ascii_lowercase) + 1)  # at least two letters and the end token
MAX_STATES = 100
MAX_TEXTS = 1000  # texts of the largest length; the tables have S x A x S entries
MAX_LENGTH = 9  # with two letters


def letters(vocabulary_size: int) -> str:
    """Return the letters of the tokens 0 to V - 2."""
    return ascii_lowercase[: vocabulary_size - 1]


def action_texts(mdp: TokenMDP) -> list[str]:
    """Return the text of each of the A actions, in the order of the MDP."""
    alphabet = letters(mdp.vocabulary_size)
    return ["".join(alphabet[t] for _, t in path if t < len(alphabet)) for path in mdp.tree.paths]


def state_texts(mdp: TokenMDP) -> list[str]:
    """Return the text of each of the S states: its number in letters, with a fixed width."""
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
    """Draw random transitions, terminations and starts, and rewards unless they are given.

    `vocabulary_size` counts the letters and the end token, `length` limits the tokens of an action.
    `rewards` has one mapping per state from action texts to rewards; other actions have reward 0.
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
    """Return rewards float64 [S, A] from one mapping per state; ConfigError if they do not fit."""
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

    Letters beyond `mdp.length` are ignored. A text with any other character is a failure: it
    receives the lowest reward of the MDP and ends the episode. A language model with the vocabulary
    of the MDP (`model=token_mdp`) cannot generate such a text. `reset(seed=...)` seeds all draws.

    Args:
        time_limit: number of actions until truncation; observations do not show it.
        num_choices: number of admissible texts of each state, drawn with the seed 0; observations
            have them as `choices`. None: all texts, without choices.
    """

    task_name = "token_mdp"

    def __init__(
        self,
        *,
        mdp: TokenMDP,
        num_envs: int = 1,
        time_limit: int | None = None,
        num_choices: int | None = None,
    ) -> None:
        check_integer("environment.num_envs", num_envs, 1)
        texts = action_texts(mdp)
        if num_choices is not None:
            check_integer("environment.num_choices", num_choices, 1, len(texts))
        if time_limit is not None:
            check_integer("environment.time_limit", time_limit, 1)
        self.mdp, self.num_envs, self.time_limit = mdp, num_envs, time_limit
        self.alphabet = letters(mdp.vocabulary_size)
        self.actions = {text: action for action, text in enumerate(texts)}
        self.observations = [self.observe(text) for text in state_texts(mdp)]
        if num_choices is not None:
            draw = np.random.default_rng(0).permutation
            for observation in self.observations:
                chosen = sorted(draw(len(texts))[:num_choices])
                observation["choices"] = tuple(texts[action] for action in chosen)
        self.rewards, self.termination = mdp.rewards.numpy(), mdp.termination.numpy()
        # cumulative sums to draw states by inversion
        self.start, self.following = mdp.start.cumsum(0).numpy(), mdp.transitions.cumsum(-1).numpy()
        self.set_spaces(spaces.Text(mdp.length, min_length=0, charset=self.alphabet))

    def observe(self, state: str) -> TextObservation:
        """Return the observation of a state."""
        request = f"State {state}. Answer with at most {self.mdp.length} letters of {self.alphabet}"
        return TextObservation(instruction=request, prefix=state, suffix="")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[TextObservation, ...], dict[str, Any]]:
        """Start a new episode in every environment."""
        super().reset(seed=seed)
        self._states = self._draw(np.tile(self.start, (self.num_envs, 1)))
        self._attempts = np.zeros(self.num_envs, dtype=np.int64)
        return tuple(self.observations[state] for state in self._states), {}

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """Take one transition in each of `envs`; see `TextVectorEnv`."""
        count = len(envs)
        errors = [self.error(action) for action in actions]
        failed = np.array([error is not None for error in errors])
        # placeholder for failures, whose reward and termination are set below
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
        """Return the error text of an invalid action, else None."""
        strange = next((c for c in action if c not in self.alphabet), None)
        return None if strange is None else f"{strange!r} is none of the letters {self.alphabet}"

    def _draw(self, sums: np.ndarray) -> np.ndarray:
        """Draw states [n] from cumulative probabilities [n, S]."""
        below = self.np_random.random((len(sums), 1)) >= sums[:, :-1]
        return below.sum(1)
