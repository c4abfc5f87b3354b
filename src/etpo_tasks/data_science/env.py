"""The data-science task: write `build_model`; the reward is its ROC AUC.

The task and the repair prompt follow ETPO (arXiv 2402.06700, section 5), `mode="remember"` follows
Reflexion (arXiv 2303.11366).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from etpo.environments.text_env import Step, TextObservation, TextVectorEnv
from etpo.errors import MAX_SEED, ConfigError, check_integer
from etpo.files import write_text
from etpo_sandbox import Sandbox
from etpo_tasks.data_science import prompts
from etpo_tasks.data_science.datasets import load_dataset
from etpo_tasks.data_science.prompts import Attempt, Memory
from etpo_tasks.data_science.scoring import ProgramScorer, Score
from etpo_tasks.data_science.script import best_program_script, write_program_data


class DataScienceEnv(TextVectorEnv):
    """`num_envs` copies of the task on one data set, scored together in one sandbox.

    The sandbox starts at the first `reset` or `step`. All randomness comes from `split_seed`; the
    seed of `reset` is ignored. The attempt limit is part of the task, so every episode ends with a
    termination.

    Args:
        mode: "repair" (the paper): a failure (reward -1) leads to the repair prompt; a success or
            the `max_attempts`-th attempt ends the episode. "improve": an episode always has
            `max_attempts` attempts, and a success leads to the improve prompt. "remember": as
            "repair", but prompts include the best program and the last distinct errors of all
            environments, without evaluations.

    `load_dataset` and `ProgramScorer` document the other arguments.
    """

    task_name = "data_science"
    program_from_action = staticmethod(prompts.program_from_action)

    def __init__(
        self,
        *,
        dataset: str,
        sandbox: Sandbox,
        path: str | None = None,
        target: str | None = None,
        data_dir: str | None = None,
        read_csv: Mapping[str, Any] | None = None,
        missing: str = "impute",
        max_rows: int = 50_000,
        protocol: str = "held_out",
        split_seed: int = 0,
        n_splits: int = 5,
        max_attempts: int = 5,
        mode: str = "repair",
        num_envs: int = 1,
        score_cache: str | None = None,
        score_cache_entries: int = 1_000_000,
    ) -> None:
        _check_choice("mode", mode, ("repair", "improve", "remember"))
        _check_choice("protocol", protocol, ("held_out", "paper"))
        counts = {"max_attempts": max_attempts, "n_splits": n_splits, "num_envs": num_envs}
        for key, count in (counts | {"score_cache_entries": score_cache_entries}).items():
            check_integer(f"environment.{key}", count, 1)
        check_integer("environment.split_seed", split_seed, 0, MAX_SEED)
        csv = {"path": path, "target": target, "data_dir": data_dir, "read_csv": read_csv}
        self.dataset = load_dataset(
            dataset, **csv, missing=missing, max_rows=max_rows, seed=split_seed
        )
        self.scorer = ProgramScorer(
            self.dataset,
            sandbox,
            protocol=protocol,
            split_seed=split_seed,
            n_splits=n_splits,
            cache_path=score_cache,
            cache_entries=score_cache_entries,
        )
        self.sandbox, self.protocol, self.mode = sandbox, protocol, mode
        self.max_attempts, self.num_envs = max_attempts, num_envs
        self.on_score: Callable[[int, int], None] | None = None
        self.task = prompts.Task(
            name=self.dataset.name,
            rows=self.scorer.n_train_rows,
            features=self.dataset.features.shape[1],
            classes=self.dataset.n_classes,
        )
        self.set_spaces()
        self._attempts = np.zeros(num_envs, dtype=np.int64)
        self._memory = prompts.NO_MEMORY
        self._remembers = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[TextObservation, ...], dict[str, Any]]:
        """Start a new episode in every environment; evaluations do not change the memory."""
        super().reset(seed=seed)
        self.scorer.start()
        self._attempts[:] = 0
        self._remembers = self.mode == "remember" and not (options or {}).get("evaluation")
        return tuple(self._first_prompt() for _ in range(self.num_envs)), {}

    def _first_prompt(self) -> TextObservation:
        return prompts.observation(self.task, memory=self._memory)

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Step:
        """Score one action of each of `envs`; see `TextVectorEnv`."""
        programs = [prompts.program_from_action(action) for action in actions]
        scores = self.scorer.score(programs, self.on_score)
        self._attempts[envs] += 1
        terminations = self._attempts[envs] >= self.max_attempts
        if self.mode != "improve":
            terminations |= [score.error is None for score in scores]
        attempts = [
            Attempt(program, score.error, None if score.error is not None else score.reward)
            for program, score in zip(programs, scores, strict=True)
        ]
        observations = [prompts.observation(self.task, a, self._memory) for a in attempts]
        if self._remembers:
            self._memory = prompts.remember(self._memory, attempts)
        infos = {
            "final_obs": np.full(len(envs), None, dtype=object),
            "error": np.array([score.error for score in scores], dtype=object),
            "attempt": self._attempts[envs],
            "cached": np.array([score.cached for score in scores]),
        }
        for row in np.flatnonzero(terminations):
            infos["final_obs"][row], observations[row] = observations[row], self._first_prompt()
        self._attempts[envs[terminations]] = 0
        rewards = np.array([score.reward for score in scores], dtype=np.float64)
        return tuple(observations), rewards, terminations, np.zeros(len(envs), dtype=bool), infos

    def held_out(self, programs: Sequence[str]) -> list[Score] | None:
        """See `ProgramScorer.held_out`."""
        return self.scorer.held_out(programs)

    def held_out_score(self, action: str) -> float | None:
        """Return the held-out ROC AUC of an action; None if it fails or no rows are held out."""
        scores = self.held_out([prompts.program_from_action(action)])
        return None if scores is None or scores[0].error is not None else scores[0].reward

    @property
    def content_hash(self) -> str:
        return self.dataset.content_hash

    @property
    def reward_key(self) -> str:
        """Everything that a score depends on except the program, as JSON text."""
        return json.dumps(self.scorer.task, sort_keys=True)

    @property
    def sandbox_level(self) -> str:
        return self.sandbox.level

    def write_best_action(self, folder: Path, action: str) -> None:
        """Write `best_action.py`, which runs without this package, and its data file."""
        text = best_program_script(prompts.program_from_action(action), self.scorer)
        write_program_data(self.scorer, folder)
        write_text(folder / "best_action.py", text)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory and the scores; loading them requires the same `reward_key`."""
        scores = self.scorer.known_scores()
        state: dict[str, Any] = {"reward_key": self.reward_key, "scores": scores}
        if self.mode == "remember":
            best, errors = self._memory
            state["memory"] = {"best": best and tuple(best), "errors": errors}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("reward_key") != self.reward_key:
            return  # scores with other data, splits or limits
        self.scorer.load_scores(state_dict["scores"])
        if "memory" in state_dict:
            best, errors = state_dict["memory"]["best"], state_dict["memory"]["errors"]
            self._memory = Memory(best and Attempt(*best), tuple(errors))

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the sandbox; called by `close`."""
        if hasattr(self, "sandbox"):  # the constructor may have raised
            self.sandbox.close()


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"environment.{key}={value} is unknown; allowed: {', '.join(allowed)}")
