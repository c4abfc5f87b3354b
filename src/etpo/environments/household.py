"""A household in text: find things in four rooms, carry them where they belong, tidy up.

After the VirtualHome tasks that TWOSOME (arXiv 2401.14151) plays with language models: many small
steps, and a reward at the end alone. Furniture, texts and rules are this file's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium import spaces

from etpo.environments.text_env import AnyText
from etpo.errors import ConfigError, check_integer

ROOMS = ("kitchen", "living room", "bedroom", "bathroom")
# furniture: its room, and whether it is a container with a door
FURNITURE = {
    "fridge": ("kitchen", True),
    "microwave": ("kitchen", True),
    "counter": ("kitchen", False),
    "sofa": ("living room", False),
    "sideboard": ("living room", True),
    "desk": ("bedroom", False),
    "wardrobe": ("bedroom", True),
    "cabinet": ("bathroom", True),
    "washstand": ("bathroom", False),
}
CONTAINERS = tuple(name for name, (_, door) in FURNITURE.items() if door)
THINGS = ("apple", "book", "cup", "lamp", "milk", "pancake", "pillow", "shirt", "soap", "towel")
MAX_STEPS = 60


@dataclass
class House:
    """What is where: the state of one episode."""

    room: str
    place: dict[str, str]  # thing -> furniture
    goal: dict[str, str]  # thing -> container that it belongs in
    held: str | None = None
    open: set[str] = field(default_factory=set)

    def here(self) -> list[str]:
        """The furniture of this room."""
        return [name for name, (room, _) in FURNITURE.items() if room == self.room]

    def on(self, furniture: str) -> list[str]:
        """The things that lie in or on a piece of furniture, seen or not."""
        return [thing for thing, place in self.place.items() if place == furniture]

    def shut(self, furniture: str) -> bool:
        return FURNITURE[furniture][1] and furniture not in self.open

    def solved(self) -> bool:
        """Every thing of the goal is in its place and behind a closed door."""
        placed = all(self.place.get(thing) == place for thing, place in self.goal.items())
        return placed and not self.open & set(self.goal.values())


def admissible(house: House) -> list[str]:
    """The actions that do something now."""
    actions = [f"go to the {room}" for room in ROOMS if room != house.room]
    for name in house.here():
        if house.shut(name):
            actions.append(f"open the {name}")
            continue
        if FURNITURE[name][1]:
            actions.append(f"close the {name}")
        if house.held is None:
            actions += [f"grab the {thing}" for thing in house.on(name)]
        else:
            actions.append(f"put the {house.held} {preposition(name)} the {name}")
    return actions


def act(house: House, action: str) -> None:
    """Changes the house by an admissible action."""
    verb, _, rest = action.partition(" ")
    name = rest.removeprefix("to ").removeprefix("the ")
    match verb:
        case "go":
            house.room = name
        case "open":
            house.open.add(name)
        case "close":
            house.open.remove(name)
        case "grab":
            house.held = name
            del house.place[name]
        case "put":
            house.place[house.held] = name.rpartition(" the ")[2]
            house.held = None


def preposition(furniture: str) -> str:
    return "in" if FURNITURE[furniture][1] else "on"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`, or `nothing`."""
    if not names:
        return "nothing"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def furniture_text(house: House, name: str) -> str:
    """What can be seen of a piece of furniture."""
    if house.shut(name):
        return f"The {name} is closed."
    if FURNITURE[name][1]:
        return f"The {name} is open; in it: {listed(house.on(name))}."
    return f"On the {name}: {listed(house.on(name))}."


def goal_text(house: House) -> str:
    parts = [f"the {thing} in the {place}" for thing, place in house.goal.items()]
    doors = listed([f"the {place}" for place in dict.fromkeys(house.goal.values())])
    return f"put {listed(parts)}, and leave {doors} closed"


class HouseholdEnv(gymnasium.Env):
    """Tidy up `num_goals` things; reward 1 when the last is in place and its door closed, else 0.

    What lies behind a closed door is not seen. One thing can be held at a time. An action that
    does nothing now is a failure: `info["error"]` and the next observation say so, and a step is
    lost. Registered as `etpo/Household-v0` with 60 steps, after which an episode is truncated.

    num_goals: 1 to 4; three take 10 to 23 actions. list_actions: observations name the admissible
    actions. history: so many of the last actions are shown. Observations are a Dict of instruction
    and prefix. Rooms, places and goals are drawn from the generator that `reset(seed=...)` seeds.
    Raises ConfigError for values out of range.
    """

    metadata: Mapping[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        *,
        num_goals: int = 3,
        list_actions: bool = True,
        history: int = 5,
        render_mode: str | None = None,
    ) -> None:
        check_integer("environment.kwargs.num_goals", num_goals, 1, 4)
        check_integer("environment.kwargs.history", history, 0)
        if not isinstance(list_actions, bool):
            raise ConfigError(
                f"environment.kwargs.list_actions={list_actions}: allowed are true, false"
            )
        self.num_goals, self.list_actions, self.history = num_goals, list_actions, history
        self.render_mode = render_mode
        self.action_space = AnyText()
        self.observation_space = spaces.Dict({"instruction": AnyText(), "prefix": AnyText()})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """A fresh house: no thing of the goal is in the container that it belongs in."""
        super().reset(seed=seed)
        random = self.np_random
        place = {thing: str(random.choice(tuple(FURNITURE))) for thing in THINGS}
        goal = {}
        for thing in random.choice(THINGS, size=self.num_goals, replace=False):
            others = [name for name in CONTAINERS if name != place[thing]]
            goal[str(thing)] = str(random.choice(others))
        self.house = House(str(random.choice(ROOMS)), place, goal)
        self.past: list[str] = []
        return self._observation(), {}

    def step(self, action: str) -> tuple[dict[str, str], float, bool, bool, dict[str, Any]]:
        """The first line of `action` is what is done."""
        words = action.strip().partition("\n")[0].lower().rstrip(" .")
        error = None
        if words in admissible(self.house):
            act(self.house, words)
            self.past.append(words)
        else:
            error = f"you cannot {words[:80]!r} now"
            self.past.append(error)
        solved = self.house.solved()
        return self._observation(), float(solved), solved, False, {"error": error}

    def render(self) -> str:
        """What an agent reads."""
        return self._observation()["instruction"]

    def _observation(self) -> dict[str, str]:
        house = self.house
        lines = [
            f"Task: {goal_text(house)}.",
            f"Rooms: {listed(ROOMS)}.",
            *(f"Before: {past}." for past in self.past[max(0, len(self.past) - self.history) :]),
            f"You are in the {house.room} and hold {listed([house.held] if house.held else [])}.",
            *(furniture_text(house, name) for name in house.here()),
        ]
        if self.list_actions:
            lines.append(f"You can: {'; '.join(admissible(house))}.")
        text = "\n".join(lines)
        return {
            "instruction": f"{text}\nAnswer with your next action.",
            "prefix": f"{text}\nNext:",
        }


gymnasium.register("etpo/Household-v0", entry_point=HouseholdEnv, max_episode_steps=MAX_STEPS)
