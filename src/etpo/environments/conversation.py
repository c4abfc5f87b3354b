"""Worked examples, earlier turns and the format of answers, for any text environment.

`etpo-train environment=X environment.examples=4 environment.history=all environment.answer=tag:a`
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from etpo.environments import validation
from etpo.environments.answers import AnswerFormat
from etpo.environments.text_env import (
    FIELDS,
    ROLES,
    AnyText,
    Message,
    Step,
    TextObservation,
    TextVectorEnv,
)
from etpo.errors import ConfigError, check_integer
from etpo.escapes import unescaped

SETTINGS = ("examples", "history", "turn_format", "answer")  # keys of conf/conversation.yaml
# optional members of an environment whose last argument is an action
_OF_ACTIONS = ("write_best_action", "held_out_score", "program_from_action")


def make_environment(config: DictConfig) -> TextVectorEnv:
    """Instantiate an environment, in a `Conversation` if its configuration asks for one."""
    bare = config.copy()
    with open_dict(bare):
        settings = {key: bare.pop(key) for key in SETTINGS if key in bare}
    environment = instantiate(bare)
    if all(settings.get(key) in (0, None) for key in ("examples", "history", "answer")):
        return environment
    try:
        return Conversation(environment, **settings)
    except BaseException:
        environment.close()
        raise


class Conversation(TextVectorEnv):
    """An environment with worked examples and earlier turns in its observations.

    In `messages` they are turns of user and assistant, in `prefix` they are texts in `turn_format`.
    Worked examples come first and are the same in every observation.

    Args:
        environment: The environment; it may have a method `examples(count)` that returns pairs of
            a question and its answer. A question is a text, or a mapping with the keys instruction
            and prefix.
        examples: Number of worked examples.
        history: Number of earlier turns of the episode, or "all".
        turn_format: Format of a turn in a prefix, with {question} and {answer}. The observation's
            prefix is the question of the last one, which ends before the answer.
        answer: Format of an answer (`AnswerFormat`). The environment receives the answer alone; an
            action without one is a failure, and the environment receives "". None: the environment
            receives the whole action.

    Raises:
        ConfigError: invalid values; an observation has `choices` and `answer` is set, or `messages`
            and `history` is set.
    """

    def __init__(
        self,
        environment: TextVectorEnv,
        *,
        examples: int = 0,
        history: int | str = 0,
        turn_format: str = "{question} {answer}\n",
        answer: str | None = None,
    ) -> None:
        check_integer("environment.examples", examples, 0)
        if history != "all" and (type(history) is not int or history < 0):
            raise ConfigError(f"environment.history={history}: allowed are 0 or more, and all")
        self.wrapped, self.num_envs = environment, environment.num_envs
        self.metadata, self.render_mode = environment.metadata, environment.render_mode
        self.history = history
        self.answer = None if answer is None else AnswerFormat(answer)
        self.before, self.between, self.after = parts_of(turn_format)
        self.solved = self._solved(examples) if examples else []
        self.past: list[list[tuple[TextObservation, str]]] = [[] for _ in range(self.num_envs)]
        self.observations: list[TextObservation] = []
        observation = spaces.Dict({field: AnyText() for field in FIELDS})
        if examples or history or has_messages(environment):
            message = spaces.Dict({"role": spaces.Text(9), "content": AnyText()})
            observation["messages"] = spaces.Sequence(message)
        self.set_spaces(observation=observation)

    def _solved(self, count: int) -> list[tuple[TextObservation, str]]:
        """Return the worked examples, validated, with written answers."""
        key, name = f"environment.examples={count}", self.wrapped.task_name
        source = getattr(self.wrapped, "examples", None)
        if source is None:
            raise ConfigError(f"{key}: allowed is 0, since {name} has no method examples(count)")
        with validation.error_prefix(f"{key}: examples() of {name}"):
            pairs = [worked_example(pair) for pair in source(count)]
            if len(pairs) != count:
                raise ConfigError(f"returned {len(pairs)}; allowed is a number that it has")
        if self.answer is not None:
            return [(question, self.answer.written(text)) for question, text in pairs]
        return pairs

    @property
    def unwrapped(self) -> TextVectorEnv:
        """The innermost environment."""
        return self.wrapped.unwrapped

    def __getattr__(self, name: str) -> Any:
        """Return an optional member of the wrapped environment; it receives answers alone."""
        if name == "wrapped":  # before the constructor, as in a copy
            raise AttributeError(name)
        member = getattr(self.wrapped, name)
        if name not in _OF_ACTIONS or self.answer is None:
            return member
        return lambda *arguments: member(*arguments[:-1], self.answers(arguments[-1:])[0])

    @property
    def on_score(self) -> Any:
        """The progress display's function, if the wrapped environment has this member."""
        return self.wrapped.on_score

    @on_score.setter
    def on_score(self, display: Any) -> None:
        self.wrapped.on_score = display

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[list[TextObservation], dict[str, Any]]:
        first, infos = self.wrapped.reset(seed=seed, options=options)
        with validation.error_prefix(f"environment {self.wrapped.task_name}"):
            self.observations = validation.column(
                "observations", first, self.num_envs, validation.observation
            )
        self.past = [[] for _ in range(self.num_envs)]
        return [self.extended(observation, []) for observation in self.observations], infos

    def step(self, actions: Sequence[str]) -> Step:
        envs = np.arange(self.num_envs)
        return self._stepped(actions, envs, self.wrapped.step(self.answers(actions)))

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        return self._stepped(actions, envs, self.wrapped.step_part(self.answers(actions), envs))

    def answers(self, actions: Sequence[str]) -> list[str]:
        """Return the texts that the environment receives."""
        if self.answer is None:
            return list(actions)
        return [self.answer.find(action) or "" for action in actions]

    def _stepped(self, actions: Sequence[str], envs: np.ndarray, returned: Step) -> Step:
        """Extend the results of a step of the wrapped environment."""
        result = validation.step_result(self.wrapped, returned, len(actions))
        following, final, errors = [], [], []
        for row, (env, action) in enumerate(zip(envs, actions, strict=True)):
            self.past[env].append((self.observations[env], action))
            last = result.final_obs[row]
            final.append(None if last is None else self.extended(last, self.past[env]))
            if result.terminated[row] or result.truncated[row]:
                self.past[env] = []
            self.observations[env] = result.observations[row]
            following.append(self.extended(result.observations[row], self.past[env]))
            missing = self.answer is not None and self.answer.find(action) is None
            fault = f"no answer of the form {self.answer.value}" if missing else None
            errors.append(fault or result.errors[row])
        infos = {
            "final_obs": np.array(final, dtype=object),
            "error": np.array(errors, dtype=object),
        }
        return following, *returned[1:4], returned[4] | infos

    def extended(
        self, observation: TextObservation, past: Sequence[tuple[TextObservation, str]]
    ) -> TextObservation:
        """Return an observation after the worked examples and the last turns of `past`."""
        own = observation.get("messages", ())
        if self.answer is not None and "choices" in observation:
            raise ConfigError(
                f"environment.answer={self.answer.value}: allowed is null, since the observations "
                f"of {self.wrapped.task_name} have choices, and an action is one of them"
            )
        if self.history and own:
            raise ConfigError(
                f"environment.history={self.history}: allowed is 0, since the observations of "
                f"{self.wrapped.task_name} have messages"
            )
        if not (self.solved or self.history):
            return observation
        window = len(past) if self.history == "all" else int(self.history)
        turns = [*self.solved, *past[max(0, len(past) - window) :]]
        texts = [self.before + o["prefix"] + self.between + text + self.after for o, text in turns]
        extended = observation.copy()
        extended["prefix"] = "".join(texts) + self.before + observation["prefix"] + self.between
        start = int(bool(own) and own[0]["role"] == "system")
        if turns:
            messages = [message for turn in turns for message in messages_of(*turn)]
            extended["messages"] = (*own[:start], *messages, *own[start:])
        return extended

    def render(self) -> tuple[Any, ...] | None:
        return self.wrapped.render()

    def close_extras(self, **kwargs: Any) -> None:
        self.wrapped.close(**kwargs)

    def state_dict(self) -> dict[str, Any]:
        return self.wrapped.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wrapped.load_state_dict(state_dict)


def has_messages(environment: TextVectorEnv) -> bool:
    """Return whether the observation space has earlier turns."""
    space = getattr(environment, "single_observation_space", None)
    return isinstance(space, spaces.Dict) and "messages" in space.spaces


def parts_of(turn_format: str) -> tuple[str, str, str]:
    """Return the texts before {question}, between it and {answer}, and after."""
    text = unescaped(turn_format) if isinstance(turn_format, str) else ""
    before, question, other = text.partition("{question}")
    between, answer, after = other.partition("{answer}")
    if not (question and answer):
        raise ConfigError(
            f"environment.turn_format={turn_format}: allowed is a text with {{question}} and, "
            "after it, {answer}"
        )
    return before, between, after


def worked_example(pair: Any) -> tuple[TextObservation, str]:
    """Validate a question and its answer."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        shown = validation.shown(pair)
        raise ConfigError(f"returned {shown}; allowed are pairs (question, answer)")
    question, answer = pair
    if isinstance(question, dict):
        question = validation.observation({"suffix": ""} | question)
    else:
        text = validation.text("question", question)
        question = TextObservation(instruction=text, prefix=text, suffix="")
    return question, validation.text("answer", answer)


def messages_of(question: TextObservation, answer: str) -> tuple[Message, Message]:
    """Return a turn as messages of the user and the assistant."""
    user, assistant = ROLES[1:]
    return (
        Message(role=user, content=question["instruction"]),
        Message(role=assistant, content=answer),
    )
