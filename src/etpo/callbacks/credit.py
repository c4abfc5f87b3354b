"""Credit of single tokens: `credit.jsonl`, and `credit.html` to look at it."""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from etpo.algorithms import losses as objectives
from etpo.algorithms import returns as soft_bellman
from etpo.algorithms.base import OnPolicyAlgorithm
from etpo.algorithms.returns import at_taken
from etpo.callbacks.episodes import cut_back
from etpo.errors import check_integer
from etpo.files import append_lines
from etpo.models.policy import LanguageModelPolicy
from etpo.models.token_text import label, token_texts
from etpo.studies.pages.credit import read_rows, write_page
from etpo.rollout.types import Record, Rollout

ALTERNATIVES = 5


class Act(NamedTuple):
    """An action and the prompt that it answers, without padding, and where it comes from."""

    prompt_ids: list[int]
    action_ids: list[int]
    iteration: int
    episode: int  # of its environment in its iteration, from 1
    env: int
    attempt: int
    prompt: str
    reward: float
    error: str | None


class TokenCredit(Callback):
    """Records, per token, what an iteration's policy, critic and objective make of some actions.

    Every `every_n_iterations` iterations the first `num_actions` actions, environment by
    environment, of the first process: lines of `folder/credit.jsonl`, from which
    `folder/credit.html` is written anew. Numbers are those before the iteration's first update.
    One action is followed: that of the lowest reward in the first recorded iteration gets a line in
    every later one, under the policy and the critic of that time. A resumed run first cuts both
    files back to the iterations before the restored one.

    title: names the run on the page, after the algorithm. docs/credit.md explains every number.
    Raises ConfigError for values out of range.
    """

    def __init__(self, folder: str, title: str, every_n_iterations: int, num_actions: int) -> None:
        check_integer("callbacks.credit.every_n_iterations", every_n_iterations, 1)
        check_integer("callbacks.credit.num_actions", num_actions, 1)
        self.file, self.page = (Path(folder) / f"credit.{end}" for end in ("jsonl", "html"))
        self.title = title
        self.every_n_iterations, self.num_actions = every_n_iterations, num_actions
        self.followed: Act | None = None
        self.lines: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.datamodule.on_targets_computed = functools.partial(self.record, trainer, pl_module)
        if trainer.is_global_zero and self.file.exists():
            cut_back(self.file, trainer.current_epoch)
            self.write(pl_module)

    @torch.no_grad()
    def record(
        self, trainer: Trainer, module: LightningModule, rollout: Rollout, batch: Any
    ) -> None:
        """Keeps the iteration's lines until it is completed."""
        # on all ranks alike, since a sharded policy runs on all or on none
        self.lines = []
        iteration = trainer.current_epoch
        if iteration % self.every_n_iterations:
            return
        rows = by_environment(len(rollout.records), rollout.num_envs)[: self.num_actions]
        acts = [act(rollout, row, iteration) for row in rows.tolist()]
        if self.followed is None:
            self.followed = min(acts, key=lambda shown: shown.reward)
        sampled = None
        if isinstance(module, OnPolicyAlgorithm):
            sampled = module.sampled_advantages(batch)
        shown = [*acts, self.followed]
        advantages = [*([None] * len(acts) if sampled is None else sampled[rows]), None]
        # a module of another kind may know no such limit
        size = getattr(module, "forward_batch_size", len(shown))
        for start in range(0, len(shown), size):
            part = slice(start, start + size)
            for line in lines_of(module, shown[part], advantages[part]):
                self.lines.append({"iteration": iteration} | line)
        self.lines[-1]["followed"] = self.followed.iteration

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (trainer.is_global_zero and self.lines):
            return
        append_lines(self.file, [json.dumps(line) + "\n" for line in self.lines])
        self.write(pl_module)

    def write(self, module: LightningModule) -> None:
        """Brings the page in line with the file."""
        write_page(self.page, read_rows(self.file), f"{type(module).__name__}, {self.title}")

    def state_dict(self) -> dict[str, Any]:
        return {"followed": None if self.followed is None else tuple(self.followed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        followed = state_dict["followed"]
        self.followed = None if followed is None else Act(*followed)


def by_environment(batch: int, num_envs: int) -> Tensor:
    """Rows [B] of a rollout, which are ordered by round, ordered by environment: int64 [B]."""
    return torch.arange(batch).view(-1, num_envs).T.reshape(-1)


def act(rollout: Rollout, row: int, iteration: int) -> Act:
    """The action in a row of a rollout."""
    actions, record = rollout.actions, rollout.records[row]
    earlier: list[Record] = rollout.records[row % rollout.num_envs : row + 1 : rollout.num_envs]
    return Act(
        prompt_ids=actions.prompt_ids[row][actions.prompt_mask[row]].tolist(),
        action_ids=actions.action_ids[row][actions.action_mask[row]].tolist(),
        iteration=iteration,
        episode=sum(other.attempt == 1 for other in earlier),
        env=record.env,
        attempt=record.attempt,
        prompt=record.prompt,
        reward=record.reward,
        error=record.error,
    )


def token_numbers(
    module: LightningModule, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor
) -> dict[str, Tensor]:
    """What policy, reference and critic say of the tokens of action_ids [B, L].

    [B, P], [B, P], [B, L] -> [B, L] each: probability, log_ratio, entropy, kl and, where the
    algorithm has them, value, q and critic_advantage, Q - beta log(pi/pi_ref) - V;
    [B, L, ALTERNATIVES] each: other_ids of the likeliest other tokens, other_probability, other_q.
    """
    inputs = prompt_ids, prompt_mask, action_ids
    log_pi = module.policy(*inputs).log_probs
    log_ref, features, _ = module.policy(*inputs, reference=True)
    taken = action_ids.unsqueeze(-1)

    count = min(ALTERNATIVES, log_pi.shape[-1] - 1)
    others = log_pi.scatter(-1, taken, float("-inf")).topk(count).indices
    numbers = {
        "probability": at_taken(log_pi, action_ids).exp(),
        "log_ratio": at_taken(log_pi, action_ids) - at_taken(log_ref, action_ids),
        "entropy": soft_bellman.expectation(log_pi, -log_pi),
        "kl": soft_bellman.kl_divergence(log_pi, log_ref),
        "other_ids": others,
        "other_probability": log_pi.gather(-1, others).exp(),
    }
    if isinstance(module, OnPolicyAlgorithm):
        value, q = module.token_values(*inputs, features, log_pi, log_ref)
        if value is not None:
            numbers["value"] = value
        if q is not None:
            # the mean of the first term under pi is V
            rebased = objectives.rebased_q(q, log_ref, log_pi, module.beta)
            numbers["critic_advantage"] = at_taken(rebased, action_ids) - value
            numbers |= {"q": at_taken(q, action_ids), "other_q": q.gather(-1, others)}
    return numbers


def padded(acts: list[Act]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and their mask [B, P], padded on the left, and actions [B, L], on the right."""
    width = max(len(shown.prompt_ids) for shown in acts)
    length = max(len(shown.action_ids) for shown in acts)
    prompt_ids = torch.zeros(len(acts), width, dtype=torch.long)
    prompt_mask = torch.zeros(len(acts), width, dtype=torch.bool)
    action_ids = torch.zeros(len(acts), length, dtype=torch.long)
    for row, shown in enumerate(acts):
        start = width - len(shown.prompt_ids)
        prompt_ids[row, start:] = torch.tensor(shown.prompt_ids)
        prompt_mask[row, start:] = True
        action_ids[row, : len(shown.action_ids)] = torch.tensor(shown.action_ids)
    return prompt_ids, prompt_mask, action_ids


def lines_of(
    module: LightningModule, acts: list[Act], sampled: list[Tensor | None]
) -> Iterator[dict[str, Any]]:
    """A line of `credit.jsonl`, but for its iteration, per action.

    sampled: per action the objective's own advantages of its tokens, [>= l], or None.
    """
    numbers = token_numbers(module, *(field.to(module.device) for field in padded(acts)))
    for row, (shown, own_sampled) in enumerate(zip(acts, sampled, strict=True)):
        length = len(shown.action_ids)
        own = {name: field[row, :length].cpu() for name, field in numbers.items()}
        if own_sampled is not None:
            own["sampled_advantage"] = own_sampled[:length].cpu()
        yield line_of(module.policy, shown, own)


def line_of(policy: LanguageModelPolicy, shown: Act, own: dict[str, Tensor]) -> dict[str, Any]:
    """One action's line from its `token_numbers`, [l] and [l, ALTERNATIVES]."""
    parts = [own[name] for name in ("critic_advantage", "sampled_advantage") if name in own]
    if parts:
        own["advantage"] = sum(parts)
    if len(parts) == 1:
        own = {name: field for name, field in own.items() if not name.endswith("_advantage")}
    other_ids, likely = own.pop("other_ids"), own["other_probability"] > 0
    others = [ids[kept].tolist() for ids, kept in zip(other_ids, likely, strict=True)]
    tokenizer = policy.tokenizer
    texts, labels = token_texts(tokenizer, shown.action_ids, others, policy.stop_ids)
    other_numbers = [own.pop(name) for name in ("other_probability", "other_q") if name in own]
    alternatives = []
    for place, names in enumerate(labels):
        columns = [rounded(field[place]) for field in other_numbers]
        # the likeliest come first, those without probability have no name
        alternatives.append([list(cells) for cells in zip(names, *columns, strict=False)])
    facts = ("env", "episode", "attempt", "prompt", "reward", "error")
    return {
        **{name: getattr(shown, name) for name in facts},
        "text": texts,
        # of tokens without a text of their own, by place
        "names": {
            str(place): label(tokenizer, token)
            for place, (token, text) in enumerate(zip(shown.action_ids, texts, strict=True))
            if text == ""
        },
        **{name: rounded(field) for name, field in own.items()},
        "alternatives": alternatives,
    }


def rounded(values: Tensor) -> list[float | None]:
    """Five significant digits; None for nan."""
    return [None if math.isnan(x) else float(f"{x:.5g}") for x in values.tolist()]
