"""The contract of a text environment: a `gymnasium.vector.VectorEnv` of strings."""

import string
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv


class TextObservation(TypedDict):
    """What an agent reads before it acts; a prompt template of the model picks the fields it needs.

    instruction: the request in words, for chat models.
    prefix: the text that the action continues, for completion and infilling models.
    suffix: the text that follows the action, for infilling models; may be empty.
    """

    instruction: str
    prefix: str
    suffix: str


# observations, rewards, terminations, truncations, infos
Step = tuple[Sequence[TextObservation], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class AnyText(spaces.Text):
    """Text of any characters and length; what is drawn from it is printable ASCII."""

    def __init__(self) -> None:
        super().__init__(64, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)


class TextVectorEnv(VectorEnv[Sequence[TextObservation], Sequence[str], np.ndarray]):
    """`num_envs` copies of a task whose observations and actions are text.

    `reset(seed=...)` returns (observations, infos); `step(actions)` returns (observations,
    rewards [num_envs] float64, terminations [num_envs] bool, truncations [num_envs] bool, infos).
    An environment that ends is reset in the same step (`AutoresetMode.SAME_STEP`): its entry in
    `observations` is the first one of the next episode and `infos["final_obs"]` holds the true
    next observation of the episode that ended (None elsewhere). `infos["error"]` holds the error
    text of a failed action or None, `infos["attempt"]` the 1-based number of the action in its
    episode; `infos["cached"]` is true where the reward was known before. All four are always there.
    The collector and the evaluation check what is sent (`etpo.environments.plain`).

    `reset(options={"evaluation": True})`: what is done until the next reset is looked at only, and
    may leave no trace in later prompts.

    `task_name` names the task in a summary. Optional members that a run uses where they exist:
    `write_best_action(folder, action)`, `held_out_score(action)`, `content_hash`, `sandbox_level`,
    and `on_score`, which a progress display sets to a callable of (done, total).
    """

    task_name: str
    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def step(self, actions: Sequence[str]) -> Step:
        """One action per environment. Raises ValueError for another number of actions."""
        if len(actions) != self.num_envs:
            raise ValueError(f"{len(actions)} actions for {self.num_envs} environments")
        return self.step_part(actions, np.arange(self.num_envs))

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """As `step`, for the environments int64 [n] alone: everything returned is theirs, [n].

        Calls do not overlap, but may come from another thread than `reset`. An environment that
        overrides `step` instead can only step all together (`rollout.pipeline_groups=1`).
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beyond the episodes, which a resumed run starts afresh.

        Plain Python and tensors only: checkpoints are read with `weights_only`.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
