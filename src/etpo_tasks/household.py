"""A text household: find things in four rooms and put them in their places.

Modelled on the VirtualHome tasks of TWOSOME (arXiv 2401.14151), with many steps and one reward at
the end. Furniture, texts and rules are different.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
from gymnasium import spaces

from etpo.environments.text_env import AnyText
from etpo.errors import ConfigError, check_integer

ROOMS = ("kitchen", "living room", "bedroom", "bathroom")
FURNITURE = {  # room, and True for a container with a door
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
    """State of one episode."""

    room: str
    place: dict[str, str]  # thing -> furniture
    goal: dict[str, str]  # thing -> container where it belongs
    held: str | None = None
    open: set[str] = field(default_factory=set)

    def here(self) -> list[str]:
        """Return the furniture of this room."""
        return [name for name, (room, _) in FURNITURE.items() if room == self.room]

    def on(self, furniture: str) -> list[str]:
        """Return the things in or on a piece of furniture, visible or not."""
        return [thing for thing, place in self.place.items() if place == furniture]

    def shut(self, furniture: str) -> bool:
        return FURNITURE[furniture][1] and furniture not in self.open

    def solved(self) -> bool:
        """Return True if all things of the goal are in their places and the doors are closed."""
        placed = all(self.place.get(thing) == place for thing, place in self.goal.items())
        return placed and not self.open & set(self.goal.values())

    def go(self, room: str) -> None:
        self.room = room

    def grab(self, thing: str) -> None:
        self.held = thing
        del self.place[thing]

    def put(self, furniture: str) -> None:
        self.place[self.held], self.held = furniture, None

    def actions(self) -> dict[str, Callable[[], None]]:
        """Return the admissible actions and their effects."""
        found = {f"go to the {room}": partial(self.go, room) for room in ROOMS if room != self.room}
        for name in self.here():
            if self.shut(name):
                found[f"open the {name}"] = partial(self.open.add, name)
                continue
            if FURNITURE[name][1]:
                found[f"close the {name}"] = partial(self.open.remove, name)
            if self.held is None:
                found |= {f"grab the {thing}": partial(self.grab, thing) for thing in self.on(name)}
            else:
                preposition = "in" if FURNITURE[name][1] else "on"
                found[f"put the {self.held} {preposition} the {name}"] = partial(self.put, name)
        return found

    def describe(self, furniture: str) -> str:
        """Return the visible state of a piece of furniture."""
        if self.shut(furniture):
            return f"The {furniture} is closed."
        is_container = FURNITURE[furniture][1]
        place = f"The {furniture} is open; in it" if is_container else f"On the {furniture}"
        return f"{place}: {listed(self.on(furniture))}."

    def goal_text(self) -> str:
        parts = [f"the {thing} in the {place}" for thing, place in self.goal.items()]
        doors = listed([f"the {place}" for place in dict.fromkeys(self.goal.values())])
        return f"put {listed(parts)}, and leave {doors} closed"


def listed(names: Sequence[str]) -> str:
    """Return `a, b and c`, or `nothing`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "nothing"


class HouseholdEnv(gymnasium.Env):
    """Put `num_goals` things in their containers and close the doors; the reward at the end is 1.

    Things behind a closed door are not visible, and only one thing can be held. An inadmissible
    action is a step without effect; `info["error"]` and the next observation report the failure.
    `list_actions`: include the admissible actions in observations. `history`: number of previous
    actions in an observation. Registered as `etpo/Household-v0`, truncated after 60 steps.
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
        key = "environment.kwargs"
        check_integer(f"{key}.num_goals", num_goals, 1, 4)  # three take 10 to 23 actions
        check_integer(f"{key}.history", history, 0)
        if not isinstance(list_actions, bool):
            raise ConfigError(f"{key}.list_actions={list_actions}: allowed are true, false")
        self.num_goals, self.list_actions, self.history = num_goals, list_actions, history
        self.render_mode = render_mode
        self.action_space = AnyText()
        self.observation_space = spaces.Dict({"instruction": AnyText(), "prefix": AnyText()})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Draw a house in which no thing of the goal is in its place."""
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
        """Perform the first line of `action`."""
        words = action.strip().partition("\n")[0].lower().rstrip(" .")
        effect = self.house.actions().get(words)
        error = None if effect else f"you cannot {words[:80]!r} now"
        if effect:
            effect()
        self.past.append(error or words)
        solved = self.house.solved()
        return self._observation(), float(solved), solved, False, {"error": error}

    def render(self) -> str:
        """Return the instruction of the last observation."""
        return self._observation()["instruction"]

    def _observation(self) -> dict[str, str]:
        house = self.house
        lines = [
            f"Task: {house.goal_text()}.",
            f"Rooms: {listed(ROOMS)}.",
            *(f"Before: {past}." for past in self.past[max(0, len(self.past) - self.history) :]),
            f"You are in the {house.room} and hold {house.held or 'nothing'}.",
            *map(house.describe, house.here()),
        ]
        if self.list_actions:
            lines.append(f"You can: {'; '.join(house.actions())}.")
        text = "\n".join(lines)
        return {
            "instruction": f"{text}\nAnswer with your next action.",
            "prefix": f"{text}\nNext:",
        }


gymnasium.register("etpo/Household-v0", entry_point=HouseholdEnv, max_episode_steps=MAX_STEPS)
