"""The interface of a text environment: a `gymnasium.vector.VectorEnv` of strings."""

import string
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NotRequired, TypedDict

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv


class Message(TypedDict):
    """An earlier turn of a conversation, as in the chat templates of transformers."""

    role: str  # system, user or assistant
    content: str


class TextObservation(TypedDict):
    """Observation of an agent; the prompt template of the model uses some of the fields."""

    instruction: str  # the request in words, for chat models
    prefix: str  # text that the action continues, for completion and infilling models
    suffix: str  # text after the action, for infilling models; may be empty
    messages: NotRequired[tuple[Message, ...]]  # turns before `instruction`, for chat models
    choices: NotRequired[tuple[str, ...]]  # admissible actions; absent: any text


FIELDS = ("instruction", "prefix", "suffix")  # the texts
ROLES = ("system", "user", "assistant")
# observations, rewards, terminations, truncations, infos
Step = tuple[Sequence[TextObservation], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class AnyText(spaces.Text):
    """Text of any characters and length; samples are printable ASCII."""

    def __init__(self) -> None:
        super().__init__(64, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)


class TextVectorEnv(VectorEnv[Sequence[TextObservation], Sequence[str], np.ndarray]):
    """`num_envs` copies of a task whose observations and actions are text.

    `reset(seed=...)` returns (observations, infos); `step(actions)` returns (observations,
    rewards [num_envs] float64, terminations [num_envs] bool, truncations [num_envs] bool, infos).
    An environment that ends is reset in the same step (`AutoresetMode.SAME_STEP`): its observation
    is the first one of the next episode. `infos` has, for each environment, `final_obs` (the last
    observation of an episode that ended, else None), `error` (text of a failed action or None),
    `attempt` (1-based number of the action in its episode) and `cached` (True if the reward was
    known before). After `reset(options={"evaluation": True})` no step may affect later prompts.

    `task_name` names the task in a summary. A run uses these optional members if they exist:
    `write_best_action(folder, action)`, `held_out_score(action)`, `content_hash`, `sandbox_level`,
    and `on_score`, which a progress display sets to a callable of (done, total).
    """

    task_name: str
    # of the actions of observations without choices: {regex: TEXT}, {json_schema: TEXT} or
    # {ebnf: TEXT}; None: any text
    grammar: Mapping[str, str] | None = None
    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def set_spaces(
        self, action: spaces.Space | None = None, observation: spaces.Space | None = None
    ) -> None:
        """Set the spaces of one environment (default: any text) and of all, as tuples."""
        self.single_action_space = action or AnyText()
        self.single_observation_space = observation or spaces.Dict(
            {field: AnyText() for field in FIELDS}
        )
        self.action_space, self.observation_space = (
            spaces.Tuple([deepcopy(space) for _ in range(self.num_envs)])
            for space in (self.single_action_space, self.single_observation_space)
        )

    def step(self, actions: Sequence[str]) -> Step:
        """Take one action per environment. Raises ValueError for another number of actions."""
        if len(actions) != self.num_envs:
            raise ValueError(f"{len(actions)} actions for {self.num_envs} environments")
        return self.step_part(actions, np.arange(self.num_envs))

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """Step only the environments `envs`, int64 [n]; all results have length n.

        Calls do not overlap, but may come from another thread than `reset`. An environment that
        overrides `step` instead can only step all at once (`rollout.pipeline_groups=1`).
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return state that a checkpoint keeps; episodes restart when a run resumes.

        Plain Python and tensors only: checkpoints are read with `weights_only`.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
