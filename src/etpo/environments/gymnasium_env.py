"""Any registered `gymnasium.Env` whose observations and actions are text, `num_envs` times.

`environment=gymnasium environment.id=my_package.my_module:MyTask-v0`
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from etpo.environments import validation
from etpo.environments.text_env import FIELDS, Step, TextObservation, TextVectorEnv
from etpo.environments.threads import DaemonThread
from etpo.errors import ConfigError, EnvironmentFailure, check_integer, described

CLOSE_SECONDS = 5.0  # for all copies together
STEP = ("observation", "reward", "terminated", "truncated", "info")


class GymnasiumEnv(TextVectorEnv):
    """`num_envs` copies of a registered environment, each in its own thread.

    The action space must be `Text`. An observation is `Text`, used as instruction and prefix, or a
    `Dict` of `Text` with some of instruction, prefix and suffix; the other texts are empty. It
    may also have `messages` (earlier turns) and `choices` (the admissible actions), in any space.
    `info` may have `error`, the text of a failed action, and `cached`, True for a reward that was
    known before. docs/environments.md lists all values that an environment may return.

    Args:
        id: as for `gymnasium.make`; `module:name-v0` imports the module, which registers it.
        kwargs: arguments of the environment.
        max_episode_steps: actions until truncation (`TimeLimit`); None: as registered.
        grammar: of the actions, as in `TextVectorEnv`; None: the environment's own, if it has one.
        group_size: copies that start with the same seed, for several answers to one question (GRPO,
            RLOO); a divisor of `num_envs`. Evaluation has no groups.

    Raises:
        ConfigError: invalid values, and, as EnvironmentFailure, an exception of any copy.
    """

    def __init__(
        self,
        *,
        id: str,
        num_envs: int = 1,
        kwargs: Mapping[str, Any] | None = None,
        max_episode_steps: int | None = None,
        grammar: Mapping[str, Any] | None = None,
        group_size: int = 1,
    ) -> None:
        check_integer("environment.num_envs", num_envs, 1)
        check_integer("environment.group_size", group_size, 1, num_envs)
        if num_envs % group_size:
            raise ConfigError(
                f"environment.group_size={group_size}: allowed are divisors of {num_envs}, the "
                "number of copies"
            )
        if max_episode_steps is not None:
            check_integer("environment.max_episode_steps", max_episode_steps, 1)
        self.group_size = group_size
        self.num_envs, self.task_name = num_envs, str(id).rpartition(":")[2]
        self.attempts = np.zeros(num_envs, dtype=np.int64)
        self.copies: list[Copy] = []
        try:
            for number in range(num_envs):
                copy = Copy(f"environment.id={id}: copy {number}")
                copy.thread.submit(copy.make, id, max_episode_steps, kwargs or {}).result()
                self.copies.append(copy)
            first = self.envs[0]
            action = getattr(first, "action_space", None)
            observation = getattr(first, "observation_space", None)
            if not isinstance(action, spaces.Text) or not is_text(observation):
                raise ConfigError(
                    f"environment.id={id}: allowed is an environment whose actions are Text and "
                    f"whose observations are Text, or a Dict of Text with keys among {FIELDS}, and "
                    "optional messages and choices"
                )
        except BaseException:
            self.close()
            raise
        self.metadata = self.metadata | first.metadata
        self.grammar = grammar or getattr(first.unwrapped, "grammar", None)
        self.set_spaces(action, observation)

    @property
    def envs(self) -> list[gymnasium.Env]:
        """Return the environment of every copy."""
        return [copy.env for copy in self.copies]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[TextObservation, ...], dict[str, Any]]:
        """Start a new episode in copy i with seed + i // group_size; see `group_size`.

        Later episodes get the same `options`.
        """
        super().reset(seed=seed)
        self.options = options
        self.attempts[:] = 0
        size = 1 if (options or {}).get("evaluation") else self.group_size
        seeds = [None if seed is None else (seed + i // size) % 2**32 for i in range(self.num_envs)]
        return tuple(
            self.call_copies(range(self.num_envs), "reset", seeds, [options] * len(seeds))
        ), {}

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """Take one action in each of `envs`, in parallel."""
        self.attempts[envs] += 1
        stepped = self.call_copies(envs, "step", actions, [self.options] * len(envs))
        following, *columns, final, errors, cached = zip(*stepped, strict=True)
        rewards, terminated, truncated = map(np.array, columns)
        infos = {
            "final_obs": np.array(final, dtype=object),
            "error": np.array(errors, dtype=object),
            "attempt": self.attempts[envs],
            "cached": np.array(cached),
        }
        self.attempts[envs[terminated | truncated]] = 0
        return following, rewards, terminated, truncated, infos

    def examples(self, count: int) -> list[tuple[Any, str]]:
        """Return the worked examples of the environment's method `examples(count)`."""
        return self.call_copies([0], "examples", [count])[0]

    def render(self) -> tuple[Any, ...]:
        """Render every copy in the `render_mode` of `kwargs`."""
        return tuple(self.call_copies(range(self.num_envs), "call", ["render"] * self.num_envs))

    def call_copies(self, envs: Iterable[int], method: str, *arguments: Sequence[Any]) -> list[Any]:
        """Call a method of the copies `envs` in parallel; `arguments` hold one value per copy.

        Raises as soon as one call fails, even if others never end.
        """
        jobs = [
            self.copies[env].thread.submit(getattr(self.copies[env], method), *values)
            for env, *values in zip(envs, *arguments, strict=True)
        ]
        wait(jobs, return_when=FIRST_EXCEPTION)
        failed = [job for job in jobs if job.done() and job.exception() is not None]
        return [job.result() for job in failed or jobs]

    def close_extras(self, **kwargs: Any) -> None:
        """Close every copy, in parallel; warn if one fails or takes too long."""
        copies, self.copies = getattr(self, "copies", []), []  # the constructor may have raised
        jobs = {copy: copy.closing() for copy in copies}
        wait(jobs.values(), CLOSE_SECONDS)
        for copy, job in jobs.items():
            late = f"{copy.name}: close() did not return in {CLOSE_SECONDS:g} s"
            failure = job.exception() if job.done() else late
            if failure is not None:
                warnings.warn(str(failure), stacklevel=2)


class Copy:
    """One environment and its thread; results are validated plain Python values."""

    env: gymnasium.Env

    def __init__(self, name: str) -> None:
        self.name, self.thread = name, DaemonThread(name)

    def make(self, id: str, max_episode_steps: int | None, kwargs: Mapping[str, Any]) -> None:
        """Create the environment, without gymnasium's checker: every step is checked here."""
        allowed = "the id of a registered environment (module:name-v0 if a module registers it)"
        options = {"max_episode_steps": max_episode_steps, "disable_env_checker": True}
        with self.failures("", f"; allowed is {allowed} and its arguments as kwargs"):
            self.env = gymnasium.make(id, **options, **kwargs)

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> TextObservation:
        """Return the first observation of a new episode."""
        returned = self.call("reset", seed=seed, options=options)
        with validation.error_prefix(f"{self.name}: reset()"):
            first, _ = unpack(returned, ("observation", "info"))
            return observation(first, self.env.observation_space)

    def step(self, action: str, options: dict[str, Any] | None) -> tuple[Any, ...]:
        """Take one action and, if it ends the episode, start the next one.

        Return next observation, reward, terminated, truncated, last observation of an episode that
        ended (else None), error, cached.
        """
        returned = self.call("step", action)
        with validation.error_prefix(f"{self.name}: step()"):
            following, reward, terminated, truncated, info = unpack(returned, STEP)
            reward = validation.reward(reward)
            terminated = validation.flag("terminated", terminated)
            truncated = validation.flag("truncated", truncated)
            info = {} if info is None else info
            if not isinstance(info, Mapping):
                raise ConfigError(f"info={validation.shown(info)}: allowed is a dict")
            error = validation.error_text(info.get("error"))
            cached = validation.flag("cached", info.get("cached") or False)
            try:
                following = observation(following, self.env.observation_space)
            except ConfigError:
                if not terminated:  # else nothing reads it
                    raise
                following = TextObservation(**dict.fromkeys(FIELDS, ""))
        final = None
        if terminated or truncated:
            following, final = self.reset(None, options), following
        return following, reward, terminated, truncated, final, error, cached

    def examples(self, count: int) -> list[tuple[Any, str]]:
        """Return worked examples; a question of a `Dict` space has all texts."""
        method = getattr(self.env.unwrapped, "examples", None)
        if method is None:
            raise ConfigError(f"{self.name}: it has no method examples(count); allowed is 0")
        with self.failures("examples() raised "):
            return method(count)

    def closing(self) -> Future[None]:
        """Start to close the environment, in a new thread if a call has not returned."""
        thread = DaemonThread(self.name) if self.thread.busy else self.thread
        job = thread.submit(self.call, "close")
        thread.stop()
        self.thread.stop()
        return job

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the environment."""
        with self.failures(f"{method}() raised "):
            return getattr(self.env, method)(*args, **kwargs)

    @contextmanager
    def failures(self, before: str, after: str = "") -> Iterator[None]:
        """Turn exceptions of the environment, except ConfigError, into EnvironmentFailure."""
        try:
            yield
        except ConfigError:
            raise
        except BaseException as error:  # SystemExit and KeyboardInterrupt too
            raise EnvironmentFailure(f"{self.name}: {before}{described(error)}{after}") from error


def unpack(returned: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the results of `reset` or `step`; ConfigError for another number of them."""
    count = f" of {len(returned)}" if isinstance(returned, tuple) else ""
    if count != f" of {len(names)}":
        kind = type(returned).__name__
        raise ConfigError(f"returned a {kind}{count}; allowed is ({', '.join(names)})")
    return returned


def is_text(space: spaces.Space | None) -> bool:
    """Return True if observations of a space can become a `TextObservation`."""
    if isinstance(space, spaces.Dict):
        texts = text_fields(space)
        known = texts <= set(FIELDS) and all(isinstance(space[key], spaces.Text) for key in texts)
        return known and len(texts) > 0
    return isinstance(space, spaces.Text)


def text_fields(space: spaces.Dict) -> set[str]:
    """Return the keys of an observation's texts."""
    return set(space) - {"messages", "choices"}


def observation(value: Any, space: spaces.Space) -> TextObservation:
    """Convert an observation of a space to a `TextObservation`."""
    if isinstance(space, spaces.Dict):
        return validation.observation(value, sorted(text_fields(space)))
    text = validation.text("observation", value)
    return TextObservation(instruction=text, prefix=text, suffix="")
