"""A text environment with dials for temporal credit assignment and a known optimum.

In the spirit of the umbrella and deep sea experiments of bsuite (arXiv 1908.03568): the dials set
how many tokens an action has, which of them decide, and when they are paid. `credit_optimum`
computes the soft optimum exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np
from gymnasium import spaces

from etpo.environments.text_env import Step, TextObservation, TextVectorEnv
from etpo.errors import MAX_SEED, ConfigError, check_integer, check_range

MAX_LENGTH, MAX_TURNS, MAX_LETTERS, MAX_NOISE_BITS = 64, 32, 8, 16
PLACES = ("first", "last", "middle", "spread")


@dataclass(frozen=True)
class Dials:
    """Settings of the credit suite, checked at construction.

    Attributes:
        length: Letters of an action, l.
        turns: Actions of an episode, T.
        deciding: Place of the deciding letters in an action: first, last, middle, spread (evenly),
            or the index of the first one.
        deciding_tokens: Number of deciding letters of an action, n. The other letters are free.
        reward: additive: each right deciding letter earns 1 / (T n). all_or_nothing: a turn earns
            1 / T if all deciding letters so far are right; a wrong one forfeits what is not paid.
        pay_every: Turns between payments of what was earned; None pays at the end of the episode.
        distractor: Reward, at once, of one wrong letter in place of a turn's first deciding letter.
            It forfeits what this turn and all later ones earn. 0: no such letter.
        cues: Number of cues. The observation shows one of them, which selects the right letters.
        cue_drawn: episode: a cue is drawn at the start of an episode; turn: at every turn.
        shows_earnings: The observation shows the number of right deciding letters that are not paid
            yet, so that the return is a function of what follows.
        noise_bits: Number of random bits in the observation, drawn at every turn, without meaning.
        letters: Size of the alphabet, k. Uniform play has 1 / k of the deciding letters right.
        target_seed: Seed of the right letters, independent of the run's seed.

    Raises:
        ConfigError: a value is out of range.
    """

    length: int = 4
    turns: int = 1
    deciding: str | int = "spread"
    deciding_tokens: int = 1
    reward: str = "additive"
    pay_every: int | None = None
    distractor: float = 0.0
    cues: int = 1
    cue_drawn: str = "episode"
    shows_earnings: bool = True
    noise_bits: int = 0
    letters: int = 4
    target_seed: int = 0

    def __post_init__(self) -> None:
        check_integer("environment.length", self.length, 1, MAX_LENGTH)
        check_integer("environment.turns", self.turns, 1, MAX_TURNS)
        check_integer("environment.deciding_tokens", self.deciding_tokens, 1, self.length)
        self._check_place()
        check_choice("environment.reward", self.reward, ("additive", "all_or_nothing"))
        if self.pay_every is not None:
            check_integer("environment.pay_every", self.pay_every, 1, self.turns)
        check_range("environment.distractor", self.distractor, 0, 1)
        check_integer("environment.letters", self.letters, 2, MAX_LETTERS)
        check_integer("environment.cues", self.cues, 1, self.letters)
        check_choice("environment.cue_drawn", self.cue_drawn, ("episode", "turn"))
        check_integer("environment.noise_bits", self.noise_bits, 0, MAX_NOISE_BITS)
        check_integer("environment.target_seed", self.target_seed, 0, MAX_SEED)

    def _check_place(self) -> None:
        """Raise ConfigError unless `deciding` is a place, or an index at which n letters fit."""
        if self.deciding in PLACES:
            return
        last = self.length - self.deciding_tokens
        if type(self.deciding) is not int or not 0 <= self.deciding <= last:
            raise ConfigError(
                f"environment.deciding={self.deciding}: allowed are {', '.join(PLACES)}, and an "
                f"index from 0 to {last}"
            )

    @property
    def all_or_nothing(self) -> bool:
        return self.reward == "all_or_nothing"

    @property
    def has_status(self) -> bool:
        """Whether an episode can forfeit its reward, so that observations show it."""
        return self.all_or_nothing or self.distractor > 0

    @property
    def positions(self) -> np.ndarray:
        """Return the places of the deciding letters, int64 [n], ascending."""
        count, free = self.deciding_tokens, self.length - self.deciding_tokens
        if self.deciding == "spread":
            return (2 * np.arange(count) + 1) * self.length // (2 * count)
        named = {"first": 0, "last": free, "middle": free // 2}
        first = named[self.deciding] if isinstance(self.deciding, str) else self.deciding
        return np.arange(count) + first

    @property
    def paydays(self) -> np.ndarray:
        """Return the turn at which each turn's earnings are paid, int64 [T]."""
        every = self.pay_every or self.turns
        return np.minimum((np.arange(self.turns) // every + 1) * every, self.turns) - 1


def check_choice(key: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of the texts `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value}: allowed are {', '.join(allowed)}")


class CreditSuiteEnv(TextVectorEnv):
    """`num_envs` copies of the task that `dials`, the fields of `Dials`, describe.

    An action is a text of exactly l letters; the grammar admits nothing else. Another text, of a
    model without the grammar, is a failure (`error`) in which every deciding letter is wrong. The
    right letter of turn t, place j and cue c is (base[t, j] + c) mod k with a random table `base`;
    the distractor is the next letter. The episode terminates after T turns and earns at most 1.

    The task is control: evaluation plays the same turns and cues, and nothing is held out.
    """

    task_name = "credit_suite"

    def __init__(self, *, num_envs: int = 1, **dials: Any) -> None:
        check_integer("environment.num_envs", num_envs, 1)
        self.num_envs, self.dials = num_envs, Dials(**dials)
        d = self.dials
        self.alphabet = ascii_lowercase[: d.letters]
        self.grammar = {"regex": f"[{self.alphabet}]{{{d.length}}}"}
        shape = d.turns, d.deciding_tokens
        self.base = np.random.default_rng(d.target_seed).integers(d.letters, size=shape)
        self.positions, self.pays = d.positions, d.paydays == np.arange(d.turns)
        self.set_spaces(spaces.Text(d.length, min_length=d.length, charset=self.alphabet))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[TextObservation, ...], dict[str, Any]]:
        """Start a new episode in every environment."""
        super().reset(seed=seed)
        count = self.num_envs
        self.turn, self.unpaid = np.zeros((2, count), dtype=np.int64)
        self.open = np.ones(count, dtype=bool)
        self.cue = self.np_random.integers(self.dials.cues, size=count)
        return self.observe(np.arange(count)), {}

    def observe(self, envs: np.ndarray) -> tuple[TextObservation, ...]:
        """Return the present observations of `envs`, with fresh noise."""
        d = self.dials
        bits = self.np_random.integers(2, size=(len(envs), d.noise_bits))
        states = self.turn[envs], self.open[envs], self.cue[envs], self.unpaid[envs]
        rows = zip(*states, bits, strict=True)
        return tuple(self.text(*row) for row in rows)

    def text(
        self, turn: int, is_open: bool, cue: int, unpaid: int, bits: np.ndarray
    ) -> TextObservation:
        """Return the observation of one environment; what is constant is left out."""
        d, words = self.dials, [f"turn{turn}"]
        if d.has_status:
            words.append("open" if is_open else "lost")
        if d.cues > 1:
            words.append(f"cue{cue}")
        if d.shows_earnings and d.turns > 1:
            width = len(str(d.turns * d.deciding_tokens))  # the prompts keep their length
            words.append(f"earned{unpaid:0{width}}")
        if d.noise_bits:
            words.append("".join(map(str, bits)))
        prefix = " ".join(words)
        request = f"{prefix}. Answer with {d.length} letters of {self.alphabet}."
        return TextObservation(instruction=request, prefix=prefix, suffix="")

    def right_letters(self, envs: np.ndarray) -> np.ndarray:
        """Return the right letters of `envs` as numbers, int64 [n envs, n]."""
        return (self.base[self.turn[envs]] + self.cue[envs, None]) % self.dials.letters

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """Take one turn in each of `envs`; see `TextVectorEnv`."""
        errors = [self.error(action) for action in actions]
        rewards = self._earn(self._deciding(actions, errors), envs)
        attempts = self.turn[envs] + 1
        ended = attempts == self.dials.turns
        self.turn[envs] = np.where(ended, 0, attempts)
        redrawn = envs if self.dials.cue_drawn == "turn" else envs[ended]
        infos = {
            "final_obs": np.full(len(envs), None, dtype=object),
            "error": np.array(errors, dtype=object),
            "attempt": attempts,
            "cached": np.zeros(len(envs), dtype=bool),
        }
        for row in np.flatnonzero(ended):  # there is no later turn: the last one once more
            env, no_bits = envs[row], np.zeros(self.dials.noise_bits, dtype=np.int64)
            last = self.dials.turns - 1, self.open[env], self.cue[env], self.unpaid[env], no_bits
            infos["final_obs"][row] = self.text(*last)
        self.open[envs[ended]], self.unpaid[envs[ended]] = True, 0
        self.cue[redrawn] = self.np_random.integers(self.dials.cues, size=len(redrawn))
        return self.observe(envs), rewards, ended, np.zeros(len(envs), dtype=bool), infos

    def error(self, action: str) -> str | None:
        """Return the error text of an action that is not l letters, else None."""
        if len(action) == self.dials.length and not set(action) - set(self.alphabet):
            return None
        return f"an action has {self.dials.length} letters of {self.alphabet}"

    def _deciding(self, actions: Sequence[str], errors: Sequence[str | None]) -> np.ndarray:
        """Return the deciding letters as numbers, int64 [n envs, n]; -1 in failed actions."""
        length = self.dials.length
        texts = [" " * length if error else a for a, error in zip(actions, errors, strict=True)]
        codes = np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8)
        numbers = codes.reshape(-1, length)[:, self.positions].astype(np.int64) - ord("a")
        return np.maximum(numbers, -1)

    def _earn(self, chosen: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """Update the earnings of `envs` and return the rewards of this turn, float64 [n envs].

        chosen: deciding letters, int64 [n envs, n].
        """
        d, target = self.dials, self.right_letters(envs)
        right = chosen == target
        lured = (chosen[:, 0] == (target[:, 0] + 1) % d.letters) & (d.distractor > 0)
        self.open[envs] &= ~lured
        if d.all_or_nothing:
            self.open[envs] &= right.all(1)
        self.unpaid[envs] += self.open[envs] * right.sum(1)
        if d.all_or_nothing:
            self.unpaid[envs] *= self.open[envs]
        paid = envs[self.pays[self.turn[envs]]]
        rewards = np.zeros(self.num_envs)
        rewards[paid] = self.unpaid[paid] / (d.turns * d.deciding_tokens)
        self.unpaid[paid] = 0
        return rewards[envs] + d.distractor * lured
