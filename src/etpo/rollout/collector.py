"""Run a language model in a text environment, independent of algorithm and task."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from etpo.environments import validation
from etpo.environments.text_env import TextObservation, TextVectorEnv
from etpo.environments.threads import DaemonThread
from etpo.generation.grammar import check_grammar
from etpo.generation.prompt_cache import PromptCache
from etpo.generation.sampler import Sample, decode_actions, first_decisions, generate
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptBatch, Turn
from etpo.rollout.types import Actions, Decisions, Record, Rollout, stack

OnProgress = Callable[[str, int, int], None]


class GroupStep(NamedTuple):
    """Outcome of one step of a group of environments."""

    actions: Actions
    next_observations: list[TextObservation]  # true next observations of the truncated actions
    turns: list[Turn | None]  # the truncated actions
    records: list[Record]
    dropped_prompt_tokens: int


class EnvGroup:
    """Environments that step together, with their observations and results.

    turns: the last turn of each environment's episode, None before the first.
    """

    def __init__(
        self,
        envs: np.ndarray,
        observations: Sequence[TextObservation],
        turns: Sequence[Turn | None] | None = None,
    ) -> None:
        self.envs = envs
        self.observations = [observations[env] for env in envs]
        self.turns = [None if turns is None else turns[env] for env in envs]
        self.step = torch.zeros(len(envs), dtype=torch.long)
        self.results: list[GroupStep] = []
        self.prompt_cache = PromptCache()
        self.prompts: PromptBatch
        self.sample: Sample
        self.texts: list[str]

    def act(
        self,
        policy: LanguageModelPolicy,
        max_new_tokens: int,
        generator: torch.Generator | None,
        grammar: Mapping[str, str] | None,
    ) -> list[str]:
        """Generate one action per environment and return the texts."""
        self.prompts = policy.encode(self.observations, self.turns)
        options = max_new_tokens, generator, grammar, self.prompt_cache
        self.sample = generate(policy, self.prompts, *options)
        self.texts = decode_actions(policy, self.prompts, self.sample)
        prompts, (ids, mask) = self.prompts, (x.cpu() for x in self.sample[:2])
        self.turns = [
            Turn(
                observation,
                prompts.ids[row][prompts.mask[row]].tolist(),
                prompts.rests[row],
                ids[row][mask[row]].tolist(),
                self.texts[row],
            )
            for row, observation in enumerate(self.observations)
        ]
        return self.texts

    def record_step(
        self, policy: LanguageModelPolicy, answer: validation.StepResult, last: bool
    ) -> None:
        """Store the outcome of the actions; `last` truncates running episodes."""
        terminated = torch.tensor(answer.terminated)
        truncated = ~terminated if last else torch.tensor(answer.truncated) & ~terminated
        following, turns = [], []
        for row in truncated.nonzero().flatten().tolist():
            final = answer.final_obs[row]
            following.append(answer.observations[row] if final is None else final)
            turns.append(self.turns[row])
        prompts, sample = self.prompts, Sample(*(x.cpu() for x in self.sample))
        actions = Actions(
            prompts.ids,
            prompts.mask,
            sample.ids,
            sample.mask,
            sample.step_mask,
            sample.hidden_states,
            sample.allowed,
            sample.support,
            torch.tensor(answer.rewards, dtype=torch.float32),
            terminated,
            truncated,
            self.step,
        )
        records = self.to_records(policy, answer)
        self.results.append(GroupStep(actions, following, turns, records, prompts.dropped))
        ended = terminated | truncated
        self.step = torch.where(ended, 0, self.step + 1)
        self.turns = [None if end else turn for end, turn in zip(ended, self.turns, strict=True)]
        self.observations = answer.observations

    def to_records(
        self, policy: LanguageModelPolicy, answer: validation.StepResult
    ) -> list[Record]:
        """Convert the actions to readable records."""
        return [
            Record(
                int(env),
                int(self.step[row]) + 1,
                str(policy.tokenizer.decode(self.prompts.ids[row][self.prompts.mask[row]])),
                self.texts[row],
                answer.rewards[row],
                answer.errors[row],
                answer.cached[row],
                bool(self.sample.length_limited[row]),
                self.observations[row],
            )
            for row, env in enumerate(self.envs)
        ]


def collect(
    policy: LanguageModelPolicy,
    environment: TextVectorEnv,
    rounds: int,
    max_new_tokens: int,
    generator: torch.Generator | None,
    seed: int,
    pipeline_groups: int = 1,
    on_progress: OnProgress | None = None,
) -> Rollout:
    """Reset the environments and take `rounds` actions in each of them.

    Episodes still running after the last round are truncated. Their next prompts are kept for
    bootstrapping.

    Args:
        generator: random generator of the sampled tokens; None decodes greedily.
        pipeline_groups: number of groups of environments; `step_part` of one group runs in a thread
            while the next group generates.
        on_progress: called with ("rollout", rounds done, rounds).

    Raises:
        ConfigError: the environment returns an invalid value (`etpo.environments.validation`).
    """
    observations = validation.reset(environment, seed, evaluation=generator is None)
    options = max_new_tokens, generator, check_grammar(environment.grammar)
    groups = [
        EnvGroup(envs, observations)
        for envs in np.array_split(np.arange(environment.num_envs), pipeline_groups)
    ]
    answers: dict[int, Callable[[], tuple[Any, ...]]] = {}
    generate_seconds = score_seconds = 0.0
    thread = DaemonThread("environment")
    try:
        for number in range(rounds + 1):
            for index, group in enumerate(groups):
                start = time.perf_counter()
                if number > 0:
                    returned = answers[index]()
                    answer = validation.step_result(environment, returned, len(group.envs))
                    group.record_step(policy, answer, last=number == rounds)
                answered = time.perf_counter()
                if number < rounds:
                    texts = group.act(policy, *options)
                    if pipeline_groups == 1:
                        answers[index] = partial(environment.step, texts)
                    else:
                        step = environment.step_part
                        answers[index] = thread.submit(step, texts, group.envs).result
                score_seconds += answered - start
                generate_seconds += time.perf_counter() - answered
            if on_progress is not None and number > 0:
                on_progress("rollout", number, rounds)
    finally:
        thread.stop()
    steps = [group.results[number] for number in range(rounds) for group in groups]
    decisions = next_decisions(policy, steps, max_new_tokens, options[-1])
    return to_rollout(
        policy, steps, decisions, environment.num_envs, generate_seconds, score_seconds
    )


def next_decisions(
    policy: LanguageModelPolicy,
    steps: list[GroupStep],
    max_new_tokens: int,
    grammar: Mapping[str, str] | None,
) -> Decisions | None:
    """Encode the true next observations of the truncated actions; None if there are none."""
    following = [observation for step in steps for observation in step.next_observations]
    if not following:
        return None
    prompts = policy.encode(following, [turn for step in steps for turn in step.turns])
    return first_decisions(policy, prompts, max_new_tokens, grammar)


def to_rollout(
    policy: LanguageModelPolicy,
    steps: list[GroupStep],
    bootstrap: Decisions | None,
    num_envs: int,
    generate_seconds: float,
    score_seconds: float,
) -> Rollout:
    """Concatenate the steps of all groups, ordered by round."""
    return Rollout(
        actions=stack([step.actions for step in steps], policy.pad_id),
        bootstrap=bootstrap,
        records=[record for step in steps for record in step.records],
        num_envs=num_envs,
        dropped_prompt_tokens=sum(step.dropped_prompt_tokens for step in steps),
        generate_seconds=generate_seconds,
        score_seconds=score_seconds,
    )
