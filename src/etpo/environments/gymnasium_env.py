"""Any gymnasium environment whose observations and actions are text, `num_envs` times.

A world is a `gymnasium.Env`, registered with gymnasium, and one line of configuration:
`environment=gymnasium environment.id=my_package.my_module:MyTask-v0`.
"""

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from etpo.environments import plain
from etpo.environments.plain import FIELDS
from etpo.environments.text_env import Step, TextObservation, TextVectorEnv
from etpo.environments.threads import DaemonThread
from etpo.errors import ConfigError, EnvironmentFailure, check_integer, described

CLOSE_SECONDS = 5.0  # that all copies together have for closing


class GymnasiumEnv(TextVectorEnv):
    """`num_envs` copies of a registered environment, each in a thread of its own.

    id: as `gymnasium.make` takes it; `module:name-v0` imports the module, which registers it.
    kwargs: arguments of the environment. max_episode_steps: actions after which an episode is
    truncated (`gymnasium.wrappers.TimeLimit`); None: what is registered.

    The action space must be `Text`. An observation is `Text`, which stands for instruction and
    prefix, or a `Dict` of `Text` with some of instruction, prefix and suffix; a field that the
    space lacks is empty. `info["error"]`, where an environment sets it, says why an action failed,
    and `info["cached"]` that its reward was known before. `reset(seed=s)` seeds copy i with s + i.
    docs/environments.md lists what else an environment may send, and what comes of it.

    Raises ConfigError for an environment that has other spaces, EnvironmentFailure for one that
    cannot be made. `reset` and `step` raise ConfigError for what an environment may not send, and
    EnvironmentFailure for what it raises, at once: copies that have not answered are left alone.
    """

    def __init__(
        self,
        *,
        id: str,
        num_envs: int = 1,
        kwargs: Mapping[str, Any] | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        check_integer("environment.num_envs", num_envs, 1)
        if max_episode_steps is not None:
            check_integer("environment.max_episode_steps", max_episode_steps, 1)
        self.num_envs = num_envs
        self.copies: list[Copy] = []
        try:
            for number in range(num_envs):
                copy = Copy(f"environment.id={id}: copy {number}")
                copy.thread.submit(copy.make, id, max_episode_steps, kwargs or {}).result()
                self.copies.append(copy)
        except BaseException:
            self.close()
            raise
        first = self.envs[0]
        self.task_name = id.rpartition(":")[2]
        self.metadata = self.metadata | first.metadata
        self.single_action_space = getattr(first, "action_space", None)
        self.single_observation_space = getattr(first, "observation_space", None)
        if not isinstance(self.single_action_space, spaces.Text) or not is_text(
            self.single_observation_space
        ):
            self.close()
            raise ConfigError(
                f"environment.id={id}: allowed is an environment whose actions are Text and whose "
                f"observations are Text, or a Dict of Text with keys among {', '.join(FIELDS)}"
            )
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.attempts = np.zeros(num_envs, dtype=np.int64)

    @property
    def envs(self) -> list[gymnasium.Env]:
        """The environment of every copy."""
        return [copy.env for copy in self.copies]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[TextObservation, ...], dict[str, Any]]:
        """Opens a new episode in every copy; episodes under way are abandoned.

        `options` are those of the episodes after it, too.
        """
        super().reset(seed=seed)
        self.options = options
        self.attempts[:] = 0
        seeds = [None if seed is None else (seed + i) % 2**32 for i in range(self.num_envs)]
        jobs = [
            copy.thread.submit(copy.reset, s, options)
            for copy, s in zip(self.copies, seeds, strict=True)
        ]
        return tuple(results(jobs)), {}

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """One action of each of `envs`, side by side."""
        self.attempts[envs] += 1
        copies = [self.copies[env] for env in envs]
        jobs = [
            copy.thread.submit(copy.step, action, self.options)
            for copy, action in zip(copies, actions, strict=True)
        ]
        answers: list[Transition] = results(jobs)
        ended = np.array([answer.terminated or answer.truncated for answer in answers])
        attempts = self.attempts[envs]
        self.attempts[envs[ended]] = 0
        final = [answer.final for answer in answers]
        infos = {
            "final_obs": np.array([*final, None], dtype=object)[:-1],  # never taken for an array
            "error": np.array([answer.error for answer in answers], dtype=object),
            "attempt": attempts,
            "cached": np.array([answer.cached for answer in answers]),
        }
        return (
            tuple(answer.following for answer in answers),
            np.array([answer.reward for answer in answers], dtype=np.float64),
            np.array([answer.terminated for answer in answers], dtype=bool),
            np.array([answer.truncated for answer in answers], dtype=bool),
            infos,
        )

    def render(self) -> tuple[Any, ...]:
        """What every copy renders, in the `render_mode` that `kwargs` names."""
        return tuple(results([copy.thread.submit(copy.call, "render") for copy in self.copies]))

    def close_extras(self, **kwargs: Any) -> None:
        """Closes every copy, side by side; warns of one that fails or takes too long."""
        copies, self.copies = getattr(self, "copies", []), []  # the constructor may have raised
        jobs = {copy: copy.closing() for copy in copies}
        wait(jobs.values(), CLOSE_SECONDS)
        for copy, job in jobs.items():
            if not job.done():
                warnings.warn(
                    f"{copy.name}: close() did not return in {CLOSE_SECONDS:g} s", stacklevel=2
                )
            elif job.exception() is not None:
                warnings.warn(str(job.exception()), stacklevel=2)


class Transition(NamedTuple):
    """What one action came to.

    following: what is read next, the first observation of the next episode where this one ended.
    final: the true next observation of an episode that ended, else None.
    """

    following: TextObservation
    reward: float
    terminated: bool
    truncated: bool
    final: TextObservation | None
    error: str | None
    cached: bool


class Copy:
    """One environment and the thread that it lives in; what it sends leaves as plain Python.

    `make`, `reset` and `step` raise ConfigError and EnvironmentFailure, with `name` in front.
    """

    env: gymnasium.Env

    def __init__(self, name: str) -> None:
        self.name, self.thread = name, DaemonThread(name)

    def make(self, id: str, max_episode_steps: int | None, kwargs: Mapping[str, Any]) -> None:
        """Makes the environment, without gymnasium's checker: every step is checked here."""
        try:
            self.env = gymnasium.make(
                id, max_episode_steps=max_episode_steps, disable_env_checker=True, **kwargs
            )
        except ConfigError:
            raise
        except BaseException as error:  # SystemExit and KeyboardInterrupt too
            raise EnvironmentFailure(
                f"{self.name}: {described(error)}; allowed is the id of a registered environment "
                "(module:name-v0 where a module registers it) and its arguments as kwargs"
            ) from error

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> TextObservation:
        """The first observation of a new episode."""
        returned = self.call("reset", seed=seed, options=options)
        with plain.sent_by(f"{self.name}: reset()"):
            read, _ = parts(returned, ("observation", "info"))
            return observation(read, self.env.observation_space)

    def step(self, action: str, options: dict[str, Any] | None) -> Transition:
        """One action and, where it ends the episode, the first observation of the next one."""
        returned = self.call("step", action)
        with plain.sent_by(f"{self.name}: step()"):
            read, paid, *flags, info = parts(
                returned, ("observation", "reward", "terminated", "truncated", "info")
            )
            reward = plain.reward(paid)
            terminated = plain.flag("terminated", flags[0])
            truncated = plain.flag("truncated", flags[1])
            if not isinstance(info, Mapping | None):
                raise ConfigError(f"info={plain.shown(info)}: allowed is a dict")
            error = plain.error_text((info or {}).get("error"))
            cached = plain.flag("cached", (info or {}).get("cached") or False)
            following = self.next_observation(read, terminated)
        final = None
        if terminated or truncated:
            following, final = self.reset(None, options), following
        return Transition(following, reward, terminated, truncated, final, error, cached)

    def next_observation(self, read: Any, terminated: bool) -> TextObservation:
        """The observation of `step`; one that cannot be read is empty after a termination."""
        try:
            return observation(read, self.env.observation_space)
        except ConfigError:
            if not terminated:
                raise
            return TextObservation(**dict.fromkeys(FIELDS, ""))

    def closing(self) -> Future[None]:
        """Closes the environment; beside a call that has not returned, which may wait for that."""
        thread = DaemonThread(self.name) if self.thread.busy else self.thread
        job = thread.submit(self.call, "close")
        for each in {thread, self.thread}:
            each.stop()
        return job

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What a method of the environment returns."""
        try:
            return getattr(self.env, method)(*args, **kwargs)
        except ConfigError:
            raise
        except BaseException as error:  # SystemExit and KeyboardInterrupt too
            raise EnvironmentFailure(
                f"{self.name}: {method}() raised {described(error)}"
            ) from error


def results(jobs: Sequence[Future[Any]]) -> list[Any]:
    """What all jobs return; raises as soon as one has failed, whether others ever end or not."""
    wait(jobs, return_when=FIRST_EXCEPTION)
    failed = [job for job in jobs if job.done() and job.exception() is not None]
    return [job.result() for job in failed or jobs]


def parts(returned: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The values that `reset` or `step` returned; ConfigError for another number of them."""
    if not isinstance(returned, tuple) or len(returned) != len(names):
        count = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise ConfigError(
            f"returned a {type(returned).__name__}{count}; allowed is ({', '.join(names)})"
        )
    return returned


def is_text(space: spaces.Space | None) -> bool:
    """Whether observations of a space can be read as a `TextObservation`."""
    if isinstance(space, spaces.Dict):
        texts = all(isinstance(part, spaces.Text) for part in space.values())
        return texts and bool(space.keys()) and set(space.keys()) <= set(FIELDS)
    return isinstance(space, spaces.Text)


def observation(read: Any, space: spaces.Space) -> TextObservation:
    """An environment's observation of a space, with all fields."""
    if not isinstance(space, spaces.Dict):
        read = plain.text("observation", read)
        return TextObservation(instruction=read, prefix=read, suffix="")
    if not isinstance(read, Mapping) or set(read) != set(space):
        raise ConfigError(
            f"observation={plain.shown(read)}: allowed is a dict with the keys {', '.join(space)}"
        )
    return plain.observation({field: read.get(field, "") for field in FIELDS})
