"""Any gymnasium environment whose observations and actions are text, `num_envs` times.

A world is a `gymnasium.Env`, registered with gymnasium, and one line of configuration:
`environment=gymnasium environment.id=my_package.my_module:MyTask-v0`.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from etpo.environments.text_env import Step, TextObservation, TextVectorEnv
from etpo.errors import ConfigError, check_integer

FIELDS = tuple(TextObservation.__annotations__)


class GymnasiumEnv(TextVectorEnv):
    """`num_envs` copies of a registered environment, each stepped in a thread of its own.

    id: as `gymnasium.make` takes it; `module:name-v0` imports the module, which registers it.
    kwargs: arguments of the environment. max_episode_steps: actions after which an episode is
    truncated (`gymnasium.wrappers.TimeLimit`); None: what is registered.

    The action space must be `Text`. An observation is `Text`, which stands for instruction and
    prefix, or a `Dict` of `Text` with some of instruction, prefix and suffix; what is missing is
    empty. `info["error"]`, where an environment sets it, says why an action failed, and
    `info["cached"]` that its reward was known before. `reset(seed=s)` seeds copy i with s + i.

    Raises ConfigError for an environment that cannot be made or has other spaces.
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
        self.envs: list[gymnasium.Env] = []
        self.threads = ThreadPoolExecutor(num_envs, "environment")
        for _ in range(num_envs):
            try:
                env = gymnasium.make(id, max_episode_steps=max_episode_steps, **(kwargs or {}))
            except ConfigError:
                raise
            except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(
                    f"environment.id={id}: {reason}; allowed is the id of a registered environment "
                    "(module:name-v0 where a module registers it) and its arguments as kwargs"
                ) from error
            self.envs.append(env)
        first = self.envs[0]
        self.task_name = id.rpartition(":")[2]
        self.metadata = self.metadata | first.metadata
        self.single_action_space = first.action_space
        self.single_observation_space = first.observation_space
        if not isinstance(first.action_space, spaces.Text) or not is_text(first.observation_space):
            raise ConfigError(
                f"environment.id={id}: allowed is an environment whose actions are Text and whose "
                f"observations are Text, or a Dict of Text with keys among {', '.join(FIELDS)}"
            )
        self.action_space = batch_space(first.action_space, num_envs)
        self.observation_space = batch_space(first.observation_space, num_envs)
        self.attempts = np.zeros(num_envs, dtype=np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[TextObservation, ...], dict[str, Any]]:
        """Opens a new episode in every copy; episodes under way are abandoned.

        `options` are those of the episodes after it, too.
        """
        super().reset(seed=seed)
        self.options = options
        seeds = [None if seed is None else (seed + i) % 2**32 for i in range(self.num_envs)]
        self.attempts[:] = 0
        jobs = [
            self.threads.submit(env.reset, seed=s, options=options)
            for env, s in zip(self.envs, seeds, strict=True)
        ]
        return tuple(observation(job.result()[0]) for job in jobs), {}

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """One action of each of `envs`, side by side."""
        self.attempts[envs] += 1
        jobs = [
            self.threads.submit(step, self.envs[env], action, self.options)
            for env, action in zip(envs, actions, strict=True)
        ]
        observations, rewards, terminations, truncations, final, infos = zip(
            *(job.result() for job in jobs), strict=True
        )
        ended = np.array(terminations) | np.array(truncations)
        attempts = self.attempts[envs]
        self.attempts[envs[ended]] = 0
        told = {
            "final_obs": np.array([*final, None], dtype=object)[:-1],  # never taken for an array
            "error": np.array([info.get("error") for info in infos], dtype=object),
            "attempt": attempts,
            "cached": np.array([bool(info.get("cached")) for info in infos]),
        }
        return (
            observations,
            np.array(rewards, dtype=np.float64),
            np.array(terminations, dtype=bool),
            np.array(truncations, dtype=bool),
            told,
        )

    def render(self) -> tuple[Any, ...]:
        """What every copy renders, in the `render_mode` that `kwargs` names."""
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        """Closes every copy."""
        if hasattr(self, "threads"):  # the constructor may have raised
            for env in self.envs:
                env.close()
            self.threads.shutdown()


def is_text(space: spaces.Space) -> bool:
    """Whether observations of a space can be read as a `TextObservation`."""
    if isinstance(space, spaces.Dict):
        texts = all(isinstance(part, spaces.Text) for part in space.values())
        return texts and bool(space.keys()) and set(space.keys()) <= set(FIELDS)
    return isinstance(space, spaces.Text)


def observation(read: str | Mapping[str, str]) -> TextObservation:
    """An environment's observation with all fields."""
    if isinstance(read, str):
        return TextObservation(instruction=read, prefix=read, suffix="")
    return TextObservation(**{field: read.get(field, "") for field in FIELDS})


def step(
    env: gymnasium.Env, action: str, options: dict[str, Any] | None
) -> tuple[TextObservation, float, bool, bool, TextObservation | None, dict[str, Any]]:
    """One action and, where it ends the episode, the first observation of the next one.

    Returns (observation, reward, terminated, truncated, final observation, info).
    """
    read, reward, terminated, truncated, info = env.step(action)
    following, final = observation(read), None
    if terminated or truncated:
        following, final = observation(env.reset(options=options)[0]), following
    return following, float(reward), bool(terminated), bool(truncated), final, info
