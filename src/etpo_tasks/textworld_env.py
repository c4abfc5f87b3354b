"""Games of Microsoft TextWorld (arXiv 1806.11532), made by seed and cached on disk.

They need the package `textworld`: `pip install -e ".[textworld]"`.
"""

import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium

from etpo import pretrained
from etpo.errors import ConfigError, check_integer
from etpo_tasks.worlds import KEY, Example, Split, World, check_level, shown

MAX_STEPS = 20
HISTORY = 4  # earlier commands in an observation
FIRST_SEED = {Split.TRAIN: 0, Split.HELD_OUT: 10**6, Split.EXAMPLE: 2 * 10**6}
WITHOUT_EFFECT = ("examine ", "inventory", "look")  # shown in every observation anyway
INFOS = (
    *("admissible_commands", "description", "inventory", "objective"),
    *("score", "max_score", "won"),
)
_LOCK = threading.Lock()  # TextWorld has one parser per process


class Level(NamedTuple):
    """Arguments of TextWorld's generator; `last_only`: the objective names only the last step."""

    rooms: int
    objects: int
    quest_length: int
    quests: int = 1
    last_only: bool = False


LEVELS = {
    1: Level(1, 4, 2),
    2: Level(3, 6, 3),
    3: Level(4, 8, 2, quests=2),
    4: Level(6, 10, 5, last_only=True),
}


class TextWorldEnv(World):
    """Do what the objective of a game demands, in rooms with things, doors and keys.

    The reward of a step is the increase of the score divided by its maximum: 1 over a game, in
    equal parts for its quests. Commands that change nothing (look, inventory, examine) are not
    admissible: every observation shows the room and the inventory. A new game takes about half a
    second and is kept in `cache_dir`. Registered as `etpo/TextWorld-v0`, truncated after 20
    commands.

    Args:
        level: 1 to 4, from one room and a quest of two steps to six rooms and five steps.
        games: number of different games in training; evaluation has as many others.
        cache_dir: folder of made games; None: `pretrained.cache_dir()`.
        kwargs: arguments of `World`.

    Raises:
        ImportError: without `textworld`.
    """

    def __init__(
        self, *, level: int = 1, games: int = 100, cache_dir: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_level(level, LEVELS)
        check_integer(f"{KEY}.games", games, 1, FIRST_SEED[Split.HELD_OUT])
        try:
            import textworld
        except ImportError as error:
            extra = 'pip install -e ".[textworld]"'
            raise ImportError(f"TextWorld is missing: {extra}") from error
        self.level, self.games = LEVELS[level], games
        version = textworld.version.__version__
        self.folder = Path(cache_dir or pretrained.cache_dir()) / f"textworld-{version}"
        self.player: Any = None

    def start(self, split: Split) -> None:
        seed = FIRST_SEED[split] + int(self.np_random.integers(self.games))
        self._play(game_file(self.folder, self.level, seed))

    def examples(self, count: int) -> list[Example]:
        """Return the states of `count` commands in games that no episode has, with the solution."""
        found: list[Example] = []
        other, seed = copy(self), FIRST_SEED[Split.EXAMPLE]
        other.player = None  # `self` keeps its game
        while len(found) < count:
            other._play(game_file(self.folder, self.level, seed), "policy_commands")
            ended = False
            while not ended:
                command = other.state.policy_commands[0]
                found.append((shown(*other.texts()), command))
                _, ended = other.act(command, None)
            seed += 1
        other.close()
        return found[:count]

    def texts(self) -> tuple[str, str]:
        state = self.state
        lines = [state.objective, *state.description.splitlines(), *state.inventory.splitlines()]
        found = [" ".join(line.split()) for line in lines if line.strip()]
        text = "\n".join([*found, *(f"> {past}" for past in self.past[-HISTORY:])])
        return f"{text}\nAnswer with your next command.", f"{text}\n> "

    def admissible(self) -> Sequence[str]:
        commands = self.state.admissible_commands
        useful = [command for command in commands if not command.startswith(WITHOUT_EFFECT)]
        return useful or commands

    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        self.past.append(error or action)
        if error is not None:
            return 0.0, False
        before = self.state.score
        with _LOCK:
            self.state, _, ended = self.player.step(action)
        return (self.state.score - before) / self.state.max_score, bool(ended)

    def close(self) -> None:
        if self.player is not None:
            self.player.close()
            self.player = None

    def _play(self, game: Path, *more_infos: str) -> None:
        """Start a game from its file."""
        import textworld

        self.game = game
        infos = textworld.EnvInfos(**dict.fromkeys([*INFOS, *more_infos], True))
        self.close()  # a player that loads another game keeps the memory of the last one
        with _LOCK:
            self.player = textworld.start(str(game), infos)
            self.player.seed(1)  # else the interpreter's generator depends on the time
            self.state = self.player.reset()
        self.past: list[str] = []


def game_file(folder: Path, level: Level, seed: int) -> Path:
    """Return the file of a game and make it if it is missing.

    Several processes may make the same game: each writes its own files and renames them.
    """
    name = "-".join(str(int(value)) for value in level) + f"-{seed}"
    made = folder / f"{name}.z8"
    with _LOCK:
        if made.exists():
            return made
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                source = make_game(Path(temporary) / made.name, level, seed)
                for suffix in (".json", ".z8"):  # the second one marks a complete game
                    source.with_suffix(suffix).replace(made.with_suffix(suffix))
        except OSError as error:
            text = f"{KEY}.cache_dir={folder.parent}: {error.strerror or error}"
            raise ConfigError(f"{text}; allowed is a folder that can be written") from error
    return made


def make_game(path: Path, level: Level, seed: int) -> Path:
    """Make the game of a seed, or of the first derived seed for which the generator succeeds."""
    from textworld.generator import QuestGenerationError, compile_game, make_game
    from textworld.generator.game import GameOptions

    for attempt in range(100):
        options = GameOptions()
        options.seeds = seed + attempt * 10**7
        options.nb_rooms, options.nb_objects = level.rooms, level.objects
        options.quest_length, options.nb_parallel_quests = level.quest_length, level.quests
        options.grammar.theme = "house"
        options.grammar.only_last_action = level.last_only
        options.path = str(path)
        with suppress(QuestGenerationError):
            return Path(compile_game(make_game(options), options))
    raise RuntimeError(f"no game of {level} for seed {seed}")


gymnasium.register("etpo/TextWorld-v0", entry_point=TextWorldEnv, max_episode_steps=MAX_STEPS)
