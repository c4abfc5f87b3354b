"""What a registered environment sends: taken as plain Python, or refused in one line."""

import datetime
import json
import math
import threading
import time
from decimal import Decimal
from fractions import Fraction

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from etpo.environments import gymnasium_env
from etpo.environments.gymnasium_env import GymnasiumEnv
from etpo.environments.text_env import AnyText
from etpo.environments.validation import MAX_ERROR
from etpo.errors import ConfigError, EnvironmentFailure

DICT = spaces.Dict({"instruction": AnyText(), "prefix": AnyText()})


class Sender(gymnasium.Env):
    """Returns from reset and step what it was made with; a callable is called with its number."""

    made = 0

    def __init__(self, first=("go", {}), then=None, space=None, close=None, **parts):
        self.number, Sender.made = Sender.made, Sender.made + 1
        self.action_space, self.observation_space = AnyText(), space or AnyText()
        step = {"read": "on", "reward": 0.0, "terminated": False, "truncated": False, "info": {}}
        self.first, self.then = first, then or tuple((step | parts).values())
        self.closing = close

    def send(self, value):
        return value(self.number) if callable(value) else value

    def reset(self, *, seed=None, options=None):
        return self.send(self.first)

    def step(self, action):
        return self.send(self.then)

    def close(self):
        self.send(self.closing)


gymnasium.register("test/Sender-v0", entry_point=Sender)
gymnasium.register("test/Limited-v0", entry_point=Sender, max_episode_steps=1)


def sender(num_envs=1, id="test/Sender-v0", **kwargs):
    Sender.made = 0
    return GymnasiumEnv(id=id, num_envs=num_envs, kwargs=kwargs)


def step(**kwargs):
    environment = sender(**kwargs)
    environment.reset(seed=0)
    try:
        return environment.step([""])
    finally:
        environment.close()


def refused(allowed, raised=ConfigError, **kwargs):
    """The one line that answers a step."""
    with pytest.raises(ConfigError) as caught:
        step(**kwargs)
    line = str(caught.value)
    assert type(caught.value) is raised
    assert line.startswith("environment.id=test/")
    assert "copy 0" in line
    assert allowed in line
    assert line.isprintable()
    assert len(line) < 500
    return line


NUMBERS = [True, 1, 1.0, Fraction(1), Decimal(1), torch.tensor(1), torch.ones(1, 1).bfloat16()]
NUMBERS += [np.dtype(kind).type(1) for kind in "?bhilqBHILQefdg"]
NUMBERS += [np.ones(()), np.ones((1, 1), dtype=np.float32), np.array(Decimal(1), dtype=object)]
NUMBERS += [torch.ones(1, requires_grad=True)]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: f"{type(v).__name__}-{v!r:.24}")
def test_any_one_real_number_is_a_reward(value):
    rewards = step(reward=value)[1]
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [1.0]


NO_REWARD = [math.nan, math.inf, -math.inf, 1e39, -3e38, 10**400, Decimal("sNaN"), Decimal("inf")]
NO_REWARD += [np.float16("inf"), np.longdouble("1e400"), torch.tensor(math.nan), None, "0.5", b"1"]
NO_REWARD += [1j, np.complex64(1), [1.0], {}, np.ones(2), np.array("1"), np.timedelta64(1, "ns")]
NO_REWARD += [torch.ones(2), torch.ones(1, dtype=torch.complex64), datetime.timedelta(1), Ellipsis]


@pytest.mark.parametrize("value", NO_REWARD, ids=lambda v: f"{type(v).__name__}-{v!r:.24}")
def test_anything_else_is_no_reward(value):
    refused("reward=", reward=value)


@pytest.mark.parametrize("value", [True, np.True_, 1, np.int8(1), 1.0, np.array([True])])
def test_truth_values_may_be_numbers_or_arrays(value):
    for name, place in (("terminated", 2), ("truncated", 3)):
        answer = step(**{name: value})
        assert answer[place].tolist() == [True]
        assert answer[5 - place].tolist() == [False]
    assert step(info={"cached": value})[4]["cached"].tolist() == [True]


@pytest.mark.parametrize("value", [None, "False", "yes", 2, math.nan, np.zeros(2, dtype=bool), []])
def test_what_is_neither_true_nor_false_is_refused(value):
    refused("terminated=", terminated=value)
    refused("truncated=", truncated=value)


def test_cached_may_be_missing_or_none_but_no_text():
    for info in ({}, {"cached": None}):
        assert step(info=info)[4]["cached"].tolist() == [False]
    refused("cached=", info={"cached": "no"})


class Silent:
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(nothing, None) for nothing in (None, False, np.False_, "", b"", 0, [], {}, ())],
        ("bad move", "bad move"),
        (np.str_("bad move"), "bad move"),
        (b"bad move", "bad move"),
        (b"\xff", "\ufffd"),
        (ValueError("bad move"), "bad move"),
        (ValueError(), "ValueError"),
        (["a", 1], "['a', 1]"),
        ({"code": 3}, "{'code': 3}"),
        (("a",), "('a',)"),
        (True, "True"),
        (np.array([1, 2]), "[1 2]"),
        ("\ud83d\ude00 \ud800", "\U0001f600 \ufffd"),
        ("a\0b\x1b[31m", "a\0b\x1b[31m"),
        ("x" * 10**6, "x" * MAX_ERROR),
        (Silent(), "Silent"),
    ],
    ids=lambda v: f"{type(v).__name__}",
)
def test_an_error_is_its_text(value, expected):
    (error,) = step(info={"error": value})[4]["error"]
    assert error == expected
    assert type(error) in (str, type(None))
    json.dumps(error).encode()
    (error or "").encode()  # strict


@pytest.mark.parametrize("info", [None, {}, {"error": None}])
def test_an_info_may_be_missing(info):
    assert step(info=info)[4]["error"].tolist() == [None]


def test_an_info_that_is_no_dict_is_refused():
    refused("info=", info="bad move")


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ("", ""),
        (np.str_("on"), "on"),
        (type("Subclass", (str,), {})("on"), "on"),
        ("on é".encode(), "on é"),
        ("on\0\x1b", "on\0\x1b"),
        ("\ud83d\ude00 \udc00", "\U0001f600 \ufffd"),
        ("\ufeffon", "\ufeffon"),
        ("x" * 10**6, "x" * 10**6),
    ],
    ids=lambda v: f"{type(v).__name__}",
)
def test_an_observation_is_plain_text(read, expected):
    for answer in (step(read=read)[0], sender(first=(read, {})).reset(seed=0)[0]):
        assert answer == ({"instruction": expected, "prefix": expected, "suffix": ""},)
        assert all(type(field) is str for field in answer[0].values())


CHAT = [{"role": "user", "content": "go"}]
TWO = {"instruction": "a", "prefix": "b"}


@pytest.mark.parametrize("read", [None, b"\xff", 3, CHAT, TWO, np.array("go"), ("a",)])
def test_an_observation_that_is_no_text_is_refused(read):
    refused("step(): observation", read=read)
    refused("step(): observation", read=read, truncated=True)
    refused("reset(): observation", first=(read, {}))


@pytest.mark.parametrize(
    "read",
    [
        "go",
        None,
        {"prefix": "b"},
        TWO | {"suffix": "c"},
        TWO | {"prefix": None},
        TWO | {"instruction": CHAT},
    ],
)
def test_a_dict_has_the_fields_of_its_space(read):
    refused("step(): observation", first=(TWO, {}), read=read, space=DICT)
    refused("reset(): observation", first=(read, {}), read=TWO, space=DICT)


def test_a_dicts_fields_come_in_any_order():
    read = {"prefix": "b", "instruction": b"a"}
    observations = step(first=(TWO, {}), read=read, space=DICT)[0]
    assert observations == ({"instruction": "a", "prefix": "b", "suffix": ""},)


AGENT = spaces.Dict({"instruction": AnyText(), "choices": spaces.Sequence(AnyText())})


@pytest.mark.parametrize("choices", [["go", "stay"], ("go", b"stay"), np.array(["go", "stay"])])
def test_choices_and_messages_become_plain_texts(choices):
    read = {"instruction": "a", "choices": choices, "messages": CHAT}
    (observation,) = step(first=(read, {}), read=read, space=AGENT)[0]
    assert observation["choices"] == ("go", "stay")
    assert observation["messages"] == ({"role": "user", "content": "go"},)
    (without,) = step(first=(read, {}), read={"instruction": "a"}, space=AGENT)[0]
    assert not {"choices", "messages"} & set(without)


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ({"choices": []}, "empty; allowed are one or more different texts"),
        ({"choices": ["go", "go"]}, "'go' occurs twice"),
        ({"choices": "go"}, "allowed is a list or tuple"),
        ({"choices": [3]}, "allowed is text"),
        ({"messages": "go"}, "allowed is a list or tuple"),
        ({"messages": [{"role": "user"}]}, "allowed is a dict with the keys role, content"),
        ({"messages": [{"role": "tool", "content": ""}]}, "allowed are system, user, assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "allowed is text"),
    ],
)
def test_bad_choices_and_messages_are_refused(part, allowed):
    read = {"instruction": "a"}
    line = refused(allowed, first=(read, {}), read=read | part, space=AGENT)
    assert f"observation['{next(iter(part))}']" in line


@pytest.mark.parametrize("read", [None, 3, CHAT, b"\xff", {}])
def test_the_observation_after_a_termination_is_not_read(read):
    observations, _, terminated, _, infos = step(read=read, terminated=True)
    assert terminated[0]
    assert observations[0]["prefix"] == "go"
    assert infos["final_obs"][0] is not None


def test_a_termination_may_be_a_truncation_too():
    _, _, terminated, truncated, _ = step(terminated=True, id="test/Limited-v0")
    assert (terminated[0], truncated[0]) == (True, True)


@pytest.mark.parametrize(
    "returned", ["go", ["go", {}], ("go",), ("go", {}, 1), {"prefix": "go"}, None]
)
def test_reset_returns_observation_and_info(returned):
    refused("(observation, info)", first=lambda _: returned)


@pytest.mark.parametrize("returned", [("on", 0.0, False, {}), None, ["on", 0.0, False, False, {}]])
def test_step_returns_five_values(returned):
    refused("(observation, reward, terminated, truncated, info)", then=lambda _: returned)


def test_objects_that_are_sent_again_and_again_are_copied():
    read, info = {"instruction": "a", "prefix": "1"}, {"error": ["first"]}
    environment = sender(first=(read, info), read=read, info=info, space=DICT)
    environment.reset(seed=0)
    before, *_, infos = environment.step([""])
    read["prefix"], info["error"][0] = "2", "second"
    after, *_ = environment.step([""])
    assert (before[0]["prefix"], after[0]["prefix"]) == ("1", "2")
    assert infos["error"].tolist() == ["['first']"]


def test_actions_are_passed_as_they_are():
    seen = []

    class Narrow(Sender):
        def __init__(self):
            super().__init__()
            self.action_space = spaces.Text(2, charset="ab")

        def step(self, action):
            seen.append(action)
            return super().step(action)

    gymnasium.register("test/Narrow-v0", entry_point=Narrow)
    environment = GymnasiumEnv(id="test/Narrow-v0")
    environment.reset(seed=0)
    environment.step(["no ä\0"])
    assert seen == ["no ä\0"]


def fail(error):
    def send(number):
        raise error

    return send


ERRORS = [RuntimeError("server\ngone \x1b[2J" + "x" * 9999), KeyError("b"), AssertionError()]
ERRORS += [SystemExit(0), KeyboardInterrupt(), StopIteration(), GeneratorExit()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_what_an_environment_raises_is_one_line(error):
    for method, place in (("reset", "first"), ("step", "then")):
        line = refused(
            f"{method}() raised {type(error).__name__}",
            raised=EnvironmentFailure,
            **{place: fail(error)},
        )
        assert "server" not in str(error) or "server gone" in line


def test_a_config_error_of_an_environment_is_left_as_it_is():
    environment = sender(first=fail(ConfigError("environment.kwargs.key=0: allowed is 1")))
    with pytest.raises(ConfigError, match=r"^environment.kwargs.key=0: allowed is 1$"):
        environment.reset(seed=0)


@pytest.mark.parametrize("method", ["reset", "step"])
def test_a_failure_is_raised_while_another_copy_hangs(method):
    released = threading.Event()

    def play(environment):
        environment.reset(seed=0)
        environment.step([""] * 3)

    def send(number):
        if number == 1:
            raise RuntimeError("server gone")
        released.wait(60)

    environment = sender(3, **{"first" if method == "reset" else "then": send})
    start = time.monotonic()
    try:
        with pytest.raises(EnvironmentFailure, match="copy 1.*server gone") as caught:
            play(environment)
        assert isinstance(caught.value.__cause__, RuntimeError)
        environment.close()
        assert time.monotonic() - start < 30
    finally:
        released.set()


def test_copies_are_closed_beside_one_that_hangs():
    released, closed = threading.Event(), []
    environment = sender(2, then=lambda number: released.wait(60) and NOTHING, close=closed.append)
    environment.reset(seed=0)
    threading.Thread(target=environment.step, args=([""] * 2,), daemon=True).start()
    while not all(copy.thread.busy for copy in environment.copies):
        time.sleep(0.01)
    environment.close()
    released.set()
    assert sorted(closed) == [0, 1]


def test_a_close_that_fails_or_hangs_is_a_warning(monkeypatch):
    monkeypatch.setattr(gymnasium_env, "CLOSE_SECONDS", 0.2)
    with pytest.warns(UserWarning, match=r"copy 0: close\(\) raised OSError: gone"):
        sender(close=fail(OSError("gone"))).close()
    released = threading.Event()
    with pytest.warns(UserWarning, match=r"copy 0: close\(\) did not return in 0.2 s"):
        sender(close=lambda _: released.wait(60)).close()
    released.set()


def test_a_copy_that_cannot_be_made_closes_those_before_it():
    closed = []

    class Second(Sender):
        def __init__(self):
            if Sender.made == 1:
                raise SystemExit("no licence")
            super().__init__(close=closed.append)

    gymnasium.register("test/Second-v0", entry_point=Second)
    Sender.made = 0
    with pytest.raises(ConfigError, match=r"^environment.id=test/Second-v0: copy 1: .*no licence"):
        GymnasiumEnv(id="test/Second-v0", num_envs=2)
    assert closed == [0]


def test_a_copy_lives_in_one_thread():
    seen = []

    class Bound(Sender):
        def __init__(self):
            seen.append(threading.get_ident())

            def watch(result):
                return lambda _: seen.append(threading.get_ident()) or result

            super().__init__(first=watch(("go", {})), then=watch(NOTHING), close=watch(None))

    gymnasium.register("test/Bound-v0", entry_point=Bound)
    environment = GymnasiumEnv(id="test/Bound-v0", num_envs=2)
    environment.reset(seed=0)
    for _ in range(3):
        environment.step_part([""], np.array([1]))
    environment.close()
    assert len(seen) == 9
    assert sorted(map(seen.count, set(seen))) == [3, 6]


NOTHING = ("on", 0.0, False, False, {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_package", "no_such_package"),
        ("raise RuntimeError('no server')", "no server"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit('no licence')", "no licence"),
        ("", "registered"),
    ],
)
def test_a_module_that_registers_nothing_is_one_line(source, reason, tmp_path, monkeypatch):
    name = f"module_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        GymnasiumEnv(id=f"{name}:Task-v0")
    line = str(caught.value)
    assert line.startswith(f"environment.id={name}:Task-v0: ")
    assert reason in line
    assert line.isprintable()


class Vector(gymnasium.vector.VectorEnv):
    num_envs = 1


class Spaceless(gymnasium.Env):
    pass


gymnasium.register("test/Vector-v0", entry_point=Vector)
gymnasium.register("test/Spaceless-v0", entry_point=Spaceless)
gymnasium.register("test/Object-v0", entry_point=lambda: 3)


@pytest.mark.parametrize("id", ["test/Vector-v0", "test/Spaceless-v0", "test/Object-v0", 3, None])
def test_what_is_no_environment_of_text_is_one_line(id):
    with pytest.raises(ConfigError, match=rf"^environment.id={id}: ") as caught:
        GymnasiumEnv(id=id)
    assert str(caught.value).isprintable()
