"""The household: its rules, what is seen, and that every house can be solved."""

from collections import deque
from copy import deepcopy

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from etpo.environments.household import FURNITURE, House, HouseholdEnv
from etpo.errors import ConfigError


def small_house(**changes):
    """An apple on the counter that belongs in the fridge, the agent in the kitchen."""
    settings = {"room": "kitchen", "place": {"apple": "counter"}, "goal": {"apple": "fridge"}}
    return House(**(settings | changes))


def test_the_shortest_way_by_hand():
    house = small_house()
    steps = ("grab the apple", "open the fridge", "put the apple in the fridge", "close the fridge")
    for step in steps:
        assert step in house.actions()
        assert not house.solved()
        house.actions()[step]()
    assert house.solved()


def test_doors_hands_and_rooms_limit_what_can_be_done():
    house = small_house(place={"apple": "fridge", "cup": "counter", "soap": "washstand"})
    assert "grab the apple" not in house.actions()  # behind a closed door
    assert "grab the soap" not in house.actions()  # in another room
    house.actions()["open the fridge"]()
    assert "grab the apple" in house.actions()
    house.actions()["grab the apple"]()
    assert "grab the cup" not in house.actions()  # the hand is full
    assert "put the apple on the counter" in house.actions()
    house.actions()["go to the bathroom"]()
    assert house.held == "apple"
    assert "put the apple on the washstand" in house.actions()
    assert "go to the bathroom" not in house.actions()


def shortest(house, limit):
    """The number of actions of the shortest way, by breadth-first search; None beyond `limit`."""
    queue, seen = deque([(house, 0)]), set()
    while queue:
        now, steps = queue.popleft()
        if now.solved():
            return steps
        key = now.room, now.held, tuple(now.place.items()), frozenset(now.open)
        if steps == limit or key in seen:
            continue
        seen.add(key)
        for action in now.actions():
            following = deepcopy(now)
            following.actions()[action]()
            queue.append((following, steps + 1))
    return None


def test_no_way_is_shorter_than_the_straightforward_one():
    for seed in range(12):
        environment = HouseholdEnv(num_goals=1)
        environment.reset(seed=seed)
        house = environment.house
        house.place = {thing: house.place[thing] for thing in house.goal}  # fewer ways to search
        best = shortest(deepcopy(house), 8)
        assert best == len(carry_out(environment)[0])


def carry_out(environment):
    """Solves the house by its true state; returns rewards and how the last step ended."""
    house, rewards = environment.house, []

    def do(action):
        _, reward, terminated, _, info = environment.step(action)
        assert info["error"] is None
        rewards.append(reward)
        return terminated

    def walk(furniture):
        if FURNITURE[furniture][0] != house.room:
            do(f"go to the {FURNITURE[furniture][0]}")
        if house.shut(furniture):
            do(f"open the {furniture}")

    for thing, target in house.goal.items():
        walk(house.place[thing])
        do(f"grab the {thing}")
        walk(target)
        do(f"put the {thing} in the {target}")
    for target in dict.fromkeys(house.goal.values()):
        if FURNITURE[target][0] != house.room:
            do(f"go to the {FURNITURE[target][0]}")
        ended = do(f"close the {target}")
    return rewards, ended


@pytest.mark.parametrize(("num_goals", "at_least"), [(1, 4), (3, 10), (4, 14)])
def test_every_house_can_be_solved_and_pays_at_the_end_alone(num_goals, at_least):
    for seed in range(30):
        environment = HouseholdEnv(num_goals=num_goals)
        environment.reset(seed=seed)
        rewards, ended = carry_out(environment)
        assert ended
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
        assert len(rewards) >= at_least


def test_what_is_behind_a_closed_door_is_not_seen():
    environment = HouseholdEnv(list_actions=False)
    environment.reset(seed=0)
    environment.house = small_house(place={"lamp": "fridge", "cup": "counter"})
    text = environment.render()
    assert "The fridge is closed." in text
    assert "On the counter: cup." in text
    assert "lamp" not in text
    environment.house.actions()["open the fridge"]()
    assert "The fridge is open; in it: lamp." in environment.render()


def test_a_useless_action_is_an_error_that_the_next_prompt_tells():
    environment = HouseholdEnv(history=2)
    environment.reset(seed=0)
    before = deepcopy(environment.house)
    observation, reward, terminated, _, info = environment.step("Sing a song.\nand more")
    assert info["error"] == "you cannot 'sing a song' now"
    assert (reward, terminated) == (0.0, False)
    assert environment.house == before
    assert "Before: you cannot 'sing a song' now." in observation["prefix"]
    for _ in range(3):
        room = next(a for a in environment.house.actions() if a.startswith("go"))
        observation = environment.step(f" {room.upper()}. ")[0]
    assert observation["prefix"].count("Before: ") == 2
    assert "sing" not in observation["prefix"]


def test_actions_are_listed_only_where_asked():
    for listed in (True, False):
        environment = HouseholdEnv(list_actions=listed)
        observation, _ = environment.reset(seed=0)
        assert ("You can: " in observation["prefix"]) is listed


def test_gymnasium_finds_nothing_to_complain_about():
    check_env(gymnasium.make("etpo/Household-v0", render_mode="ansi").unwrapped)
    assert gymnasium.spec("etpo/Household-v0").max_episode_steps == 60


@pytest.mark.parametrize(
    ("key", "value"), [("num_goals", 0), ("num_goals", 5), ("history", -1), ("list_actions", 1)]
)
def test_bad_input_is_one_line_that_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"^environment\.kwargs\.{key}={value}: allowed"):
        HouseholdEnv(**{key: value})
