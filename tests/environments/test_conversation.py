"""Worked examples, earlier turns and answers of any environment."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from etpo import train
from etpo.config import CONF
from etpo.environments.answers import AnswerFormat
from etpo.environments.conversation import Conversation, make_environment
from etpo.environments.gymnasium_env import GymnasiumEnv
from etpo.environments.text_env import AnyText, TextVectorEnv
from etpo.errors import ConfigError
from etpo.evaluate import play
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo_tasks.data_science.env import DataScienceEnv


class Sums(gymnasium.Env):
    """Asks for sums of two digits; three questions per episode."""

    observation_space = action_space = AnyText()

    def __init__(self, solved=None, seen=None):
        self.solved, self.seen = solved, [] if seen is None else seen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.ask(), {}

    def ask(self):
        self.a, self.b = (int(digit) for digit in self.np_random.integers(0, 10, 2))
        return f"{self.a}+{self.b} ="

    def step(self, action):
        self.seen.append(action)
        right, self.count = action == str(self.a + self.b), self.count + 1
        error = None if action.isdigit() else "no number"
        return self.ask(), float(right), self.count == 3, False, {"error": error}

    def examples(self, count):
        return self.solved or [(f"1+{i} =", str(1 + i)) for i in range(count)]


class Choosing(Sums):
    """Observations have choices, messages, or both."""

    observation_space = spaces.Dict(
        {"instruction": AnyText(), "prefix": AnyText(), "messages": AnyText(), "choices": AnyText()}
    )

    def __init__(self, **extra):
        super().__init__()
        self.extra = {"messages": (), "choices": None} | extra

    def ask(self):
        return {"instruction": "which", "prefix": "x", **self.extra}


class Silent(Sums):
    examples = None


for each in (Sums, Choosing, Silent):
    gymnasium.register(f"test/{each.__name__}-v0", entry_point=each)


def sums(num_envs=1, name="Sums", **kwargs):
    return GymnasiumEnv(id=f"test/{name}-v0", num_envs=num_envs, kwargs=kwargs)


def contents(observation):
    return [(m["role"], m["content"]) for m in observation.get("messages", ())]


SOLVED = [("user", "1+0 ="), ("assistant", "1"), ("user", "1+1 ="), ("assistant", "2")]
LINES = "1+0 = 1\n1+1 = 2\n"


def test_worked_examples_begin_every_observation():
    environment = Conversation(sums(2), examples=2)
    observations, _ = environment.reset(seed=0)
    bare, _ = sums(2).reset(seed=0)
    for _ in range(4):
        for shown, own in zip(observations, bare, strict=True):
            assert contents(shown) == SOLVED
            assert shown["prefix"] == f"{LINES}{own['prefix']} "
            assert shown["instruction"] == own["instruction"]
        observations = environment.step(["1", "1"])[0]
        bare = [env.unwrapped.unwrapped for env in environment.envs]
        bare = [dict.fromkeys(("prefix", "instruction"), f"{e.a}+{e.b} =") for e in bare]


@pytest.mark.parametrize("history", [0, 1, 2, "all"])
def test_history_has_the_last_turns_of_the_episode(history):
    form = {"turn_format": r"Q: {question}\nA:{answer}\n", "answer": "last_line"}
    environment = Conversation(sums(), history=history, examples=1, **form)
    (observation,), _ = environment.reset(seed=1)
    turns, window = [("1+0 =", "1")], 9 if history == "all" else history
    for action in ("well,\n3", "4", "5"):
        shown = [turns[0], *turns[max(1, len(turns) - window) :]]
        assert contents(observation) == [m for turn in shown for m in as_messages(*turn)]
        lines = "".join(f"Q: {question}\nA:{answer}\n" for question, answer in shown)
        assert observation["prefix"] == f"{lines}Q: {observation['instruction']}\nA:"
        turns.append((observation["instruction"], action))
        (observation,), _, terminated, _, infos = environment.step([action])
    assert terminated[0]
    assert contents(observation) == SOLVED[:2]  # a new episode
    shown = [turns[0], *turns[max(1, len(turns) - window) :]]
    last = infos["final_obs"][0]
    assert contents(last) == [m for turn in shown for m in as_messages(*turn)]


def as_messages(question, answer):
    return ("user", question), ("assistant", answer)


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        ("last_line", "so\n 12 \n\n", "12"),
        ("first_line", "\n 12\r\nso", "12"),
        ("last_line", " \n", None),
        ("tag:answer", "<answer>1</answer> no: <answer>\n12\n</answer>.", "12"),
        ("tag:answer", "so <answer>12", "12"),  # </answer> as a stop string is no part of the text
        ("tag:answer", "12</answer>", None),
        ("fenced", "so\n```python\n  a\nb\n```\nthus", "  a\nb"),
        ("fenced", "~~~\n1\n~~~\n````\n```\n12\n````", "```\n12"),
        ("fenced", "```\n12", "12"),
        ("fenced", "```\n```", ""),
        ("fenced", "12", None),
        (r"= (\d+)", "1 = 1, 6+6 = 12", "12"),
        (r"(?i)answer: (?P<number>\d+)", "Answer: 12", "12"),
        (r"= (\d+)", "= x", None),
        (r"=(\d+)?", "=", None),
    ],
)
def test_an_answer_is_found_or_not(form, text, answer):
    assert AnswerFormat(form).find(text) == answer


@pytest.mark.parametrize("form", ["lastline", "tag:", "tag:<a>", r"\d+", r"(\d)(\d)", "(", 3, ""])
def test_another_format_of_answers_is_one_line(form):
    with pytest.raises(ConfigError, match=r"^environment\.answer=.*: allowed are null, first_line"):
        AnswerFormat(form)


def test_the_environment_receives_the_answer_and_the_records_have_the_whole_text():
    seen = []
    environment = Conversation(sums(seen=seen), history="all", answer="tag:answer")
    environment.reset(seed=0)
    said = ["It is <answer> 12 </answer>.", "It is 12."]
    (observation,), *_, infos = environment.step(said[:1])
    assert infos["error"].tolist() == [None]
    (observation,), _, _, _, infos = environment.step(said[1:])
    assert seen == ["12", ""]
    assert infos["error"].tolist() == ["no answer of the form tag:answer"]
    assert [c for role, c in contents(observation) if role == "assistant"] == said


def test_worked_examples_have_the_form_of_answers():
    for form, text in (("tag:answer", "<answer>1</answer>"), ("fenced", "```\n1\n```")):
        (observation,), _ = Conversation(sums(), examples=1, answer=form).reset()
        assert contents(observation) == [("user", "1+0 ="), ("assistant", text)]
        assert observation["prefix"].startswith(f"1+0 = {text}\n")
    with pytest.raises(ConfigError, match="the worked example with the answer '1' has no such"):
        Conversation(sums(), examples=1, answer=r"is (\d+)")


def test_a_question_may_have_two_texts():
    solved = [({"instruction": "one and one?", "prefix": "1+1 ="}, "2")]
    (observation,), _ = Conversation(sums(solved=solved), examples=1).reset()
    assert contents(observation) == [("user", "one and one?"), ("assistant", "2")]
    assert observation["prefix"].startswith("1+1 = 2\n")


SYSTEM = {"role": "system", "content": "Count."}
TURN = {"role": "user", "content": "before"}


def test_messages_of_the_environment_follow_the_examples():
    own = Conversation(sums(name="Choosing", messages=(SYSTEM, TURN)), examples=1).reset()[0][0]
    expected = [("system", "Count."), *SOLVED[:2], ("user", "before")]
    assert contents(own) == expected


@pytest.mark.parametrize(
    ("settings", "kwargs", "message"),
    [
        ({"answer": "last_line"}, {"choices": ("a", "b")}, r"answer=last_line: allowed is null"),
        ({"history": "all"}, {"messages": (TURN,)}, r"history=all: allowed is 0, since"),
    ],
)
def test_settings_that_do_not_fit_the_observations_are_one_line(settings, kwargs, message):
    environment = Conversation(sums(name="Choosing", **kwargs), **settings)
    with pytest.raises(ConfigError, match=rf"^environment\.{message}"):
        environment.reset()
    with_choices = Conversation(
        sums(name="Choosing", choices=("a", "b")), history="all", examples=1
    )
    assert with_choices.reset()[0][0]["choices"] == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": -1}, "examples=-1"),
        ({"examples": "four"}, "examples=four"),
        ({"history": -1}, "history=-1: allowed are 0 or more, and all"),
        ({"history": True}, "history=True"),
        ({"history": "every"}, "history=every"),
        ({"turn_format": "{answer}{question}"}, "turn_format="),
        ({"turn_format": 3}, "turn_format=3"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=rf"^environment\.{message}"):
        Conversation(sums(), **settings)


@pytest.mark.parametrize(
    ("solved", "message"),
    [
        ([("1", "1")] * 3, "returned 3; allowed is a number that it has"),
        ([("1",)], r"returned \('1',\); allowed are pairs"),
        ([("1", 1)], "answer=1: allowed is text"),
        ([({"prefix": "1"}, "1")], "observation="),
    ],
)
def test_bad_examples_are_one_line(solved, message):
    with pytest.raises(ConfigError, match=rf"^environment\.examples=1: .*{message}"):
        Conversation(sums(solved=solved), examples=1)


def test_an_environment_without_examples_is_named(letter_env):
    for environment in (letter_env(1), sums(name="Silent")):
        with pytest.raises(ConfigError, match=r"environment\.examples=1.* has no method examples"):
            Conversation(environment, examples=1)


def test_the_members_of_the_environment_are_kept(letter_env, tmp_path):
    class Rich(letter_env):
        content_hash, on_score = "abc", None
        best, state = None, None

        def write_best_action(self, folder, action):
            self.best = folder, action

        def held_out_score(self, action):
            return action

        def state_dict(self):
            return {"number": 1}

        def load_state_dict(self, state):
            self.state = state

    rich = Rich(4)
    environment = Conversation(rich, answer="last_line")
    assert environment.task_name == "letters"
    assert environment.content_hash == "abc"
    environment.on_score = len
    assert rich.on_score is len
    environment.write_best_action(tmp_path, "so\nc")
    assert rich.best == (tmp_path, "c")
    assert environment.held_out_score("so\nc") == "c"
    assert environment.state_dict() == {"number": 1}
    environment.load_state_dict({"number": 2})
    assert rich.state == {"number": 2}
    environment.reset()
    observations, rewards, *_ = environment.step_part(["a\ncccc"], np.array([2]))
    assert (len(observations), rewards.tolist()) == (1, [1.0])
    plain = Conversation(letter_env(1), answer="last_line")
    for name in ("content_hash", "on_score", "held_out_score", "write_best_action"):
        assert not hasattr(plain, name)
    environment.close()
    environment.close()
    assert rich.closed_count == 1


def test_evaluation_reaches_the_environment():
    class Noted(Sums):
        def reset(self, *, seed=None, options=None):
            self.options = options
            return super().reset(seed=seed)

    gymnasium.register("test/Noted-v0", entry_point=Noted)
    environment = Conversation(sums(2, name="Noted"), history=1)
    environment.reset(seed=0, options={"evaluation": True})
    assert [env.unwrapped.options for env in environment.envs] == [{"evaluation": True}] * 2


@pytest.mark.parametrize("form", [None, "last_line"])
def test_a_wrapper_steps_all_at_once_if_the_environment_does(letter_env, form, checkpoint):
    class Together(letter_env):
        step_part = TextVectorEnv.step_part

        def step(self, actions):
            return letter_env.step_part(self, actions, np.arange(self.num_envs))

    environment = Conversation(Together(3), history="all", answer=form)
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    limits = {"max_new_tokens": 3, "max_actions": 2, "generator": None, "seed": 0}
    assert len(play(policy, environment, 3, **limits)) == 3


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def test_the_settings_are_keys_of_every_environment():
    cfg = composed("environment=gymnasium", "environment.id=test/Sums-v0", "rollout.num_envs=2")
    environment = make_environment(cfg.environment)
    assert type(environment) is GymnasiumEnv
    cfg.environment.examples = 2
    environment = make_environment(cfg.environment)
    assert environment.reset()[0][1]["prefix"].startswith(LINES)
    assert environment.num_envs == 2
    cfg = composed("environment.answer=fenced", "environment.sandbox.workers=1")
    environment = make_environment(cfg.environment)
    assert isinstance(environment.unwrapped, DataScienceEnv)
    environment.close()
    cfg = composed("environment=token_mdp", "environment.history=all")
    assert isinstance(instantiate(cfg.environment, _target_="builtins.dict"), dict)
    assert isinstance(make_environment(cfg.environment), Conversation)


def test_a_bad_setting_ends_the_command_in_one_line(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ended = command(train.main, "environment.examples=2", "environment.sandbox.workers=1")
    assert ended.status == 2
    assert "environment.examples=2: allowed is 0" in ended.err
    assert ended.err.count("\n") == 1
