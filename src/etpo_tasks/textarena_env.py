"""Single-player games of TextArena (arXiv 2504.11442) as gymnasium environments.

They need the package `textarena`: `pip install -e ".[textarena]"`.
"""

import contextlib
import random
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
from gymnasium import spaces

from etpo.environments.text_env import AnyText
from etpo.errors import ConfigError, one_line
from etpo_tasks.textarena_moves import moves_of
from etpo_tasks.worlds import check_flag

_INVALID = "You attempted an invalid move. Reason: "
_FETCH_WORDS = "python -m nltk.downloader words averaged_perceptron_tagger_eng"
_LOCK = threading.RLock()  # the games draw from the module `random`


class TextArenaEnv(gymnasium.Env):
    """A game of TextArena with a reward at the end.

    An invalid move is a failure (`info["error"]`). Turn limits are part of the game, so every
    episode ends with a termination. The seed determines the whole game, also with parallel copies,
    without changing the global generator. Registered as `etpo/TextArena-v0`.

    Args:
        game: name in TextArena. With the suffix `-train` observations are the rules, the game's
            messages and the current board, otherwise the whole conversation.
        options: arguments of the game.
        choices: include the admissible moves in observations, for the games of `textarena_moves`.

    Raises ConfigError if the game is unknown, cannot be created (its words or a key are missing) or
    needs several players; ImportError without `textarena`.
    """

    metadata: Mapping[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        *,
        game: str,
        options: Mapping[str, Any] | None = None,
        choices: bool = True,
        render_mode: str | None = None,
    ) -> None:
        check_flag("choices", choices)
        try:
            import textarena
        except ImportError as error:
            raise ImportError('TextArena is missing: pip install -e ".[textarena]"') from error
        if game not in textarena.envs.registration.ENV_REGISTRY:
            raise ConfigError(
                f"environment.kwargs.game={game}: allowed are names of TextArena such as "
                "FrozenLake-v0-train, GuessTheNumber-v0-train, TowerOfHanoi-v0-train"
            )
        self._make = lambda: textarena.make(game, **(options or {}))
        self.render_mode = render_mode
        self._name = game
        self._moves: tuple[str, ...] = ()
        self._list_moves = moves_of(game) if choices else None
        self.action_space = AnyText()
        fields: dict[str, spaces.Space] = {"instruction": AnyText(), "prefix": AnyText()}
        if self._list_moves is not None:
            fields["choices"] = spaces.Sequence(AnyText())
        self.observation_space = spaces.Dict(fields)
        self._state = random.Random(0).getstate()
        with self._own_random(), self._one_line():
            self._make()  # reports missing words before a model is loaded
        self._state = random.Random(0).getstate()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start a new game; without a seed, draw one from the current generator."""
        super().reset(seed=seed)
        with self._own_random(), self._one_line():
            self._game = self._make()  # a reused wrapper keeps messages of the last game
            self._game.reset(num_players=1, seed=int(self.np_random.integers(2**31)))
            return self._read(), {}

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Make one move; TextArena adds brackets around it if the game needs them."""
        state = self._game.state
        errors = state.error_count
        with self._own_random():
            done, _ = self._game.step(action.strip())
            observed = self._read()
        refused = state.error_count > errors or state.game_info[0]["invalid_move"]
        error = self._reason() if refused else None
        reward = float(self._game.close()[0][0]) if done else 0.0
        return observed, reward, bool(done), False, {"error": error}

    def render(self) -> str:
        """Return the last observation."""
        return self._observed

    def _read(self) -> dict[str, Any]:
        self._observed = self._game.get_observation()[1]
        observation: dict[str, Any] = {"instruction": self._observed}
        observation["prefix"] = f"{self._observed.rstrip()}\nMove:"
        if self._list_moves is not None:
            moves = tuple(f"[{move}]" for move in dict.fromkeys(self._list_moves(self._game)))
            self._moves = moves or self._moves  # there may be none after the end
            observation["choices"] = self._moves
        return observation

    def _reason(self) -> str:
        """Return the game's explanation of the last invalid move."""
        state = self._game.state
        if state.game_info[0]["invalid_move"]:
            return state.game_info[0]["reason"]
        texts = (text for _, text in reversed(state.logs) if text.startswith(_INVALID))
        return next(texts).removeprefix(_INVALID).partition(" Please resubmit")[0]

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Raise ConfigError if the game cannot be created or played alone."""
        key = f"environment.kwargs.game={self._name}"
        try:
            yield
        except ConfigError:
            raise
        except (AssertionError, ValueError, TypeError) as error:  # players, board, keys, options
            raise ConfigError(f"{key}: {one_line(str(error))}") from error
        except LookupError as error:
            if "nltk" not in str(error):
                raise
            raise ConfigError(
                f"{key}: its words are missing; fetch them: {_FETCH_WORDS}"
            ) from error

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Use this game's state of the module `random` inside the context."""
        with _LOCK:
            before = random.getstate()
            random.setstate(self._state)
            try:
                yield
            finally:
                self._state = random.getstate()
                random.setstate(before)


gymnasium.register("etpo/TextArena-v0", entry_point=TextArenaEnv)
