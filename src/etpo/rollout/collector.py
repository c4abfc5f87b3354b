"""Plays a language model in a text environment; knows nothing of the algorithm or the task."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from etpo.environments import plain
from etpo.environments.text_env import TextObservation, TextVectorEnv
from etpo.environments.threads import DaemonThread
from etpo.generation.sampler import Sample, action_texts, sample
from etpo.models.policy import LanguageModelPolicy, PromptBatch
from etpo.rollout.types import Actions, Record, Rollout, pad_stack

OnProgress = Callable[[str, int, int], None]


class Round(NamedTuple):
    """What one step of a group of environments left."""

    prompts: PromptBatch
    sample: Sample
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    step: Tensor
    following: list[TextObservation]  # true next observations of the truncated actions
    records: list[Record]


class Group:
    """Environments that act together: what they see, and what their actions came to."""

    def __init__(self, envs: np.ndarray, observations: Sequence[TextObservation]) -> None:
        self.envs = envs
        self.observations = [observations[env] for env in envs]
        self.attempt = torch.zeros(len(envs), dtype=torch.long)
        self.rounds: list[Round] = []
        self.prompts: PromptBatch
        self.taken: Sample
        self.texts: list[str]

    def act(
        self, policy: LanguageModelPolicy, max_new_tokens: int, generator: torch.Generator | None
    ) -> list[str]:
        """The texts of one action per environment."""
        self.prompts = policy.encode(self.observations)
        self.taken = sample(policy, self.prompts, max_new_tokens, generator)
        self.texts = action_texts(policy, self.prompts, self.taken)
        return self.texts

    def receive(self, policy: LanguageModelPolicy, answer: plain.Answer, last: bool) -> None:
        """Takes what came of the actions; `last`: open episodes are cut here."""
        ended = torch.tensor(answer.terminated)
        cut = ~ended if last else torch.tensor(answer.truncated) & ~ended
        following = []
        for row in cut.nonzero().flatten().tolist():
            final = answer.final_obs[row]
            following.append(answer.observations[row] if final is None else final)
        reward = torch.tensor(answer.rewards, dtype=torch.float32)
        records = self.written(policy, answer)
        self.rounds.append(
            Round(self.prompts, self.taken, reward, ended, cut, self.attempt, following, records)
        )
        self.attempt = torch.where(ended | cut, 0, self.attempt + 1)
        self.observations = answer.observations

    def written(self, policy: LanguageModelPolicy, answer: plain.Answer) -> list[Record]:
        """The actions as a person reads them."""
        return [
            Record(
                int(env),
                int(self.attempt[row]) + 1,
                str(policy.tokenizer.decode(self.prompts.ids[row][self.prompts.mask[row]])),
                self.texts[row],
                answer.rewards[row],
                answer.errors[row],
                answer.cached[row],
                bool(self.taken.length_limited[row]),
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
    groups: int = 1,
    on_progress: OnProgress | None = None,
) -> Rollout:
    """Plays `rounds` actions in every environment, from fresh episodes; greedy without generator.

    With several `groups` of environments, the actions of one are answered (`step_part`, in a
    thread) while those of the next are generated. Episodes that are open after the last round are
    truncated: their true next prompts are kept for bootstrapping. `on_progress(stage, done,
    total)` is called with stage "rollout".

    Raises ConfigError for what an environment may not send (`etpo.environments.plain`).
    """
    first, _ = environment.reset(seed=seed, options={"evaluation": generator is None})
    source = f"environment {environment.task_name}"
    with plain.sent_by(source):
        observations = plain.observations(first, environment.num_envs)
    parts = [
        Group(envs, observations)
        for envs in np.array_split(np.arange(environment.num_envs), groups)
    ]
    answers: dict[int, Callable[[], tuple[Any, ...]]] = {}
    generate_seconds = score_seconds = 0.0
    thread = DaemonThread("environment")
    try:
        for number in range(rounds + 1):
            for index, part in enumerate(parts):
                start = time.perf_counter()
                if number > 0:
                    returned = answers[index]()
                    with plain.sent_by(source):
                        answer = plain.answer(returned, len(part.envs))
                    part.receive(policy, answer, last=number == rounds)
                answered = time.perf_counter()
                if number < rounds:
                    texts = part.act(policy, max_new_tokens, generator)
                    if groups == 1:
                        answers[index] = partial(environment.step, texts)
                    else:
                        answers[index] = thread.submit(
                            environment.step_part, texts, part.envs
                        ).result
                score_seconds += answered - start
                generate_seconds += time.perf_counter() - answered
            if on_progress is not None and number > 0:
                on_progress("rollout", number, rounds)
    finally:
        thread.stop()
    done = [part.rounds[number] for number in range(rounds) for part in parts]
    next_prompts = encode_any(policy, [o for r in done for o in r.following])
    return Rollout(
        actions=stack(done, policy.pad_id),
        bootstrap_ids=next_prompts.ids,
        bootstrap_mask=next_prompts.mask,
        records=[record for r in done for record in r.records],
        num_envs=environment.num_envs,
        dropped_prompt_tokens=sum(r.prompts.dropped for r in done),
        generate_seconds=generate_seconds,
        score_seconds=score_seconds,
    )


def encode_any(policy: LanguageModelPolicy, observations: Sequence[TextObservation]) -> PromptBatch:
    """`policy.encode`, for no observation too: [0, 1]."""
    if observations:
        return policy.encode(observations)
    return PromptBatch(torch.zeros(0, 1).long(), torch.zeros(0, 1).bool(), 0)


def stack(rounds: list[Round], pad_id: int) -> Actions:
    """All rounds as one batch, in their order."""
    return Actions(
        prompt_ids=pad_stack([r.prompts.ids for r in rounds], pad_id, left=True),
        prompt_mask=pad_stack([r.prompts.mask for r in rounds], False, left=True),
        action_ids=pad_stack([r.sample.ids.cpu() for r in rounds], pad_id, left=False),
        action_mask=pad_stack([r.sample.mask.cpu() for r in rounds], False, left=False),
        log_probs=pad_stack([r.sample.log_probs.cpu() for r in rounds], 0.0, left=False),
        features=pad_stack([r.sample.features.cpu() for r in rounds], 0.0, left=False),
        rewards=torch.cat([r.rewards for r in rounds]),
        terminated=torch.cat([r.terminated for r in rounds]),
        truncated=torch.cat([r.truncated for r in rounds]),
        step=torch.cat([r.step for r in rounds]),
    )
