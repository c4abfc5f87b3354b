"""Token credit: `credit.jsonl`, and `credit.html` to view it; docs/credit.md explains both."""

import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from etpo.algorithms.base import OnPolicyAlgorithm
from etpo.algorithms.evaluation import PrefixValues, prefix_states
from etpo.algorithms.returns import expectation, kl_divergence
from etpo.callbacks.episodes import truncate_lines
from etpo.errors import check_integer
from etpo.files import append_lines
from etpo.models.token_columns import TokenColumns
from etpo.models.token_text import label, token_texts
from etpo.rollout.types import Decisions, Rollout
from etpo.studies.pages.credit import write_page

ALTERNATIVES = 5
TOKEN_FIELDS = {"action_ids": "action_ids", "steps": "step_mask", "allowed": "allowed"}


class TokenCredit(Callback):
    """Record what policy, critic and objective compute for every token of some actions.

    The first `num_actions` actions of rank zero, ordered by environment, are recorded every
    `every_n_iterations` iterations, before the iteration's first update. One action is followed:
    the action with the lowest reward of the first recorded iteration is evaluated again in every
    later one. A resumed run truncates both files to the iterations before the restored one. On the
    page, `title` follows the name of the algorithm.
    """

    def __init__(self, folder: str, title: str, every_n_iterations: int, num_actions: int) -> None:
        check_integer("callbacks.credit.every_n_iterations", every_n_iterations, 1)
        check_integer("callbacks.credit.num_actions", num_actions, 1)
        self.file, self.title = Path(folder) / "credit.jsonl", title
        self.every_n_iterations, self.num_actions = every_n_iterations, num_actions
        self.followed: dict[str, Any] | None = None
        self.lines: list[dict[str, Any]] = []  # written when the iteration is completed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.datamodule.on_targets_computed = functools.partial(self.record, trainer, pl_module)
        if trainer.is_global_zero and self.file.exists():
            truncate_lines(self.file, trainer.current_epoch)
            self.write_page(pl_module)

    @torch.no_grad()
    def record(
        self, trainer: Trainer, module: LightningModule, rollout: Rollout, batch: Any
    ) -> None:
        """Evaluate the selected actions; on all ranks, since the policy may be sharded."""
        self.lines, iteration = [], trainer.current_epoch
        if iteration % self.every_n_iterations:
            return
        # rows are ordered by round, then by environment
        rows = torch.arange(len(rollout.records)).view(-1, rollout.num_envs).T.flatten()
        selected = {row: select(rollout, row) for row in rows[: self.num_actions].tolist()}
        if self.followed is None:
            action = min(selected.values(), key=lambda action: action["record"]["reward"])
            self.followed = action | {"iteration": iteration}
        advantages = None
        if isinstance(module, OnPolicyAlgorithm):
            advantages = module.sampled_advantages(batch)
        sampled = [None if advantages is None else advantages[row] for row in selected]
        actions = [*selected.values(), self.followed]
        settings = getattr(module, "settings", None)  # a module of another kind may have none
        size = getattr(settings, "logits_chunk_size", sys.maxsize)
        numbers = [n for part in parts(actions, size) for n in token_numbers(module, part)]
        for columns in zip(actions, numbers, [*sampled, None], strict=True):
            self.lines.append({"iteration": iteration} | credit_line(module, *columns))
        self.lines[-1]["followed"] = self.followed["iteration"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.lines:
            append_lines(self.file, [json.dumps(line) + "\n" for line in self.lines])
            self.write_page(pl_module)

    def write_page(self, module: LightningModule) -> None:
        """Write the page from `credit.jsonl`."""
        write_page(self.file, f"{type(module).__name__}, {self.title}")

    def state_dict(self) -> dict[str, Any]:
        return {"followed": self.followed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.followed = state_dict["followed"]


def select(rollout: Rollout, row: int) -> dict[str, Any]:
    """Return a row's prompt_ids, TOKEN_FIELDS, without padding, and record."""
    actions, record = rollout.actions, rollout.records[row]
    until_now = rollout.records[row % rollout.num_envs : row + 1 : rollout.num_envs]
    episode = sum(other.attempt == 1 for other in until_now)
    names = ("attempt", "prompt", "reward", "error")
    fields = {name: getattr(record, name) for name in names}
    return {
        "prompt_ids": actions.prompt_ids[row][actions.prompt_mask[row]].tolist(),
        **{
            name: getattr(actions, field)[row][actions.action_mask[row]].tolist()
            for name, field in TOKEN_FIELDS.items()
        },
        "fold": row % rollout.num_envs % 2,
        "record": {"env": record.env, "episode": episode, **fields},
    }


def parts(actions: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Split actions into lists of at most `size` tokens, but at least one action."""
    part: list[dict[str, Any]] = []
    for action in actions:
        tokens = sum(len(each["action_ids"]) for each in [*part, action])
        if part and tokens > size:
            yield part
            part = []
        part.append(action)
    yield part


def token_numbers(
    module: LightningModule, actions: list[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    """Evaluate policy, reference and critic at the l tokens of each action.

    Returns:
        [l] each: probability, log_ratio, entropy, kl and, if the algorithm has them, value, q and
        critic_advantage, Q - beta log(pi/pi_ref) - V. [l, ALTERNATIVES] each, of the most likely
        other tokens: other_ids, other_probability, other_q.
    """
    rows = pad_actions(actions, module.device)
    fold = None
    if getattr(getattr(module, "critic", None), "cross_fit", False):  # the head of the other half
        fold = torch.tensor([action["fold"] for action in actions], device=module.device)
    policy, tree = module.policy, rows.tree(fold)
    allowed = rows.allowed.flatten(0, 1)[tree.first]
    columns = TokenColumns.of(policy.vocabulary_size, allowed)
    states = prefix_states(policy, tree, len(tree.node), allowed)
    log_pi, _ = policy.log_probs(states.old, columns, taken=columns.places(tree.taken))
    log_ref, _ = policy.log_probs(states.ref, columns, reference=True)
    values = PrefixValues()
    if isinstance(module, OnPolicyAlgorithm):
        values = module.loss_values(tree, states, columns, log_pi, log_ref)
    # forced tokens need not have a column
    places = columns.places(rows.action_ids).clamp(max=log_pi.shape[-1] - 1)[..., None]
    kl, entropy = kl_divergence(log_pi, log_ref), expectation(log_pi, -log_pi)
    count = min(ALTERNATIVES, log_pi.shape[-1] - 1)

    def of_tokens(x: Tensor) -> Tensor:
        return tree.of_tokens(x).gather(-1, places).squeeze(-1)

    by_token = tree.of_tokens(log_pi)
    without_taken = by_token.scatter(-1, places, float("-inf"))
    without_taken[~tree.mask] = float("-inf")
    others = without_taken.topk(count).indices
    log_ratio = of_tokens(log_pi) - of_tokens(log_ref)
    numbers = {
        "probability": of_tokens(log_pi).exp(),  # 1 of forced tokens
        "log_ratio": log_ratio,
        "entropy": tree.of_tokens(entropy),
        "kl": tree.of_tokens(kl),
        "other_ids": others if columns.ids is None else columns.ids[others],
        "other_probability": without_taken.gather(-1, others).exp(),
    }
    if values.value is not None:
        numbers["value"] = untrained(tree.of_tokens(values.value), tree.mask)
    if values.q is not None:
        q = tree.of_tokens(values.q)
        numbers |= {"q": untrained(of_tokens(values.q), tree.mask), "other_q": q.gather(-1, others)}
        difference = numbers["q"] - module.beta * log_ratio - numbers["value"]
        numbers["critic_advantage"] = difference.nan_to_num(0.0)
    return [
        {name: x[row, : len(action["action_ids"])].cpu() for name, x in numbers.items()}
        for row, action in enumerate(actions)
    ]


def untrained(values: Tensor, step_mask: Tensor) -> Tensor:
    """Set values [B, L] of forced tokens, which the critic is not trained on, to NaN."""
    return torch.where(step_mask, values, float("nan"))


def pad_actions(actions: list[dict[str, Any]], device: torch.device) -> Decisions:
    """Return the output of `select` of some actions as padded tensors."""
    prompts, ids, steps, sets = (
        [torch.tensor(action[name], device=device) for action in actions]
        for name in ("prompt_ids", "action_ids", "steps", "allowed")
    )
    left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    prompt_mask = left([torch.ones_like(p).bool() for p in prompts])
    ids, steps = (pad_sequence(x, batch_first=True) for x in (ids, steps))
    words = max(x.shape[-1] for x in sets)
    whole = [x.new_full((len(x), words), -1) for x in sets]
    pairs = zip(sets, whole, strict=True)
    sets = [(x if x.shape[-1] == words else every).int() for x, every in pairs]
    return Decisions(left(prompts), prompt_mask, ids, steps, pad_sequence(sets, batch_first=True))


def credit_line(
    module: LightningModule,
    action: dict[str, Any],
    numbers: dict[str, Tensor],
    sampled: Tensor | None,
) -> dict[str, Any]:
    """Return an action's line of `credit.jsonl`, without its iteration.

    numbers: output of `token_numbers`. sampled: the advantages of its tokens in the objective,
    [>= l], or None.
    """
    tokenizer, ids = module.policy.tokenizer, action["action_ids"]
    if sampled is not None:
        numbers["sampled_advantage"] = sampled[: len(ids)].cpu()
    parts = [name for name in ("critic_advantage", "sampled_advantage") if name in numbers]
    if parts:
        numbers["advantage"] = sum(numbers[name] for name in parts)
    if len(parts) == 1:
        del numbers[parts[0]]
    possible = numbers["other_probability"] > 0
    others = [o[p].tolist() for o, p in zip(numbers.pop("other_ids"), possible, strict=True)]
    texts, labels = token_texts(tokenizer, ids, others, module.policy.stop_ids)
    rounded = {name: round_digits(values.tolist()) for name, values in numbers.items()}
    columns = [rounded.pop(name) for name in ("other_probability", "other_q") if name in rounded]
    return {
        **action["record"],
        "text": texts,
        # of tokens without text, by position
        "names": {str(i): label(tokenizer, ids[i]) for i, text in enumerate(texts) if text == ""},
        **rounded,
        # zip ends at the last label: tokens without probability have none
        "alternatives": [
            [list(cells) for cells in zip(*row, strict=False)]
            for row in zip(labels, *columns, strict=True)
        ],
    }


def round_digits(value: Any) -> Any:
    """Round the numbers of nested lists to five significant digits; None for nan."""
    if isinstance(value, list):
        return [round_digits(entry) for entry in value]
    return None if math.isnan(value) else float(f"{value:.5g}")
