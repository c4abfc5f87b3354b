"""Compare forwards and backwards over a tree of prefixes with plain sequences, in one run.

    python benchmarks/tree.py [--models 0.9M 25M smollm2-135m] [--rounds 2]

LoRA of rank 16 on all linear layers, float32. Three forms compute the same last hidden states, and
the gradients of a loss over them:

- plain: prompt and action of every row as one padded sequence, as trainers of transformers do
- prompts once: each distinct prompt once, then its distinct actions on copies of its cache
- tree: each distinct token once, in rows of at most 64, 128 or 256 tokens

The first two run in parts of at most 2,048 tokens, whose gradients add up: all rows at once would
need up to 13 GB with SmolLM2. The forms alternate. The script writes `tree.csv`; its table has the
medians.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from common import (
    ALL_MODELS,
    MODELS,
    RESULTS,
    model_folder,
    policy_with_lora,
    worked_questions,
    write,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from etpo.models.causal_lm import last_hidden_states, trunk_of
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prefix_tree import PACKED_TOKENS, prefix_tree
from etpo.models.shared_prompt import position_ids, prefill
from etpo.models.tree_forward import forward_tree
from etpo.runtime import keep_freed_memory

PART_TOKENS = 2048
LIMITS = (64, 128, 256)
PLAIN, PROMPTS_ONCE = "plain", "prompts once"


class Rows(NamedTuple):
    """Prompts [B, P], padded on the left, and actions [B, L], padded on the right."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    action_ids: Tensor
    action_mask: Tensor

    def parts(self, tokens: int) -> Iterator["Rows"]:
        """Split the rows such that a part has about PART_TOKENS of all `tokens`."""
        count = -(-tokens // PART_TOKENS)
        return map(Rows, *(x.chunk(count) for x in self))


def rows_of(pairs: list[tuple[list[int], list[int]]]) -> Rows:
    """Return pairs of prompt and action as padded tensors."""
    width, length = (max(len(pair[i]) for pair in pairs) for i in (0, 1))
    left = [torch.tensor([-1] * (width - len(p)) + p) for p, _ in pairs]
    right = [torch.tensor(a + [-1] * (length - len(a))) for _, a in pairs]
    prompts, actions = torch.stack(left), torch.stack(right)
    return Rows(prompts.clamp(min=0), prompts >= 0, actions.clamp(min=0), actions >= 0)


def workloads(policy: LanguageModelPolicy) -> dict[str, Rows]:
    """Return the workloads; but for the questions, tokens are random."""
    source = random.Random(0)

    def text(size: int) -> list[int]:
        return [source.randrange(3, policy.vocabulary_size) for _ in range(size)]

    prompt = text(60)
    one = [(prompt, text(16)) for _ in range(64)]
    groups = [(p, text(8)) for p in (text(60) for _ in range(16)) for _ in range(4)]
    conversations, system = [], text(20)
    for _ in range(8):
        history = system + text(4)
        for _ in range(10):
            action = text(4)
            conversations.append((history, action))
            history = history + action + text(4)
    tokenizer = policy.tokenizer
    questions = [
        (tokenizer(prompt)["input_ids"], tokenizer(f" {answer}\n")["input_ids"])
        for prompt, answer in worked_questions(64)
    ]
    return {
        "one prompt x 64 actions": rows_of(one),
        "16 prompts x 4 actions": rows_of(groups),
        "8 conversations of 10 turns": rows_of(conversations),
        "64 questions, 4 worked examples": rows_of(questions),
    }


def plain(trunk: nn.Module, rows: Rows) -> Iterator[Tensor]:
    """Compute the loss of every row as one sequence, in parts."""
    for part in rows.parts(rows.prompt_ids.numel() + rows.action_ids.numel()):
        length = part.action_ids.shape[1]
        mask = torch.cat([part.prompt_mask, part.action_mask[:, :-1]], dim=1)
        hidden = last_hidden_states(
            trunk,
            last=length,
            input_ids=torch.cat([part.prompt_ids, part.action_ids[:, :-1]], dim=1),
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            use_cache=False,
        )
        yield loss_of(hidden[part.action_mask])


def prompts_once(trunk: nn.Module, rows: Rows) -> Iterator[Tensor]:
    """Compute the loss with each distinct prompt once and its cache copied for its rows."""
    distinct = rows.prompt_ids.unique(dim=0)
    for part in rows.parts(distinct.numel() + rows.action_ids.numel()):
        read = torch.cat([part[0], part[1].long(), part[2][:, :-1]], dim=1)
        read, row = read.unique(dim=0, return_inverse=True)
        size = part.prompt_ids.shape[1]
        ids, mask, actions = read.tensor_split([size, 2 * size], dim=1)
        filled = prefill(trunk, ids, mask)
        for layer in filled.cache.layers:
            layer.keys, layer.values = (x[filled.prompt_index] for x in (layer.keys, layer.values))
        mask = pad(mask, (0, actions.shape[1]), value=1)
        following = last_hidden_states(
            trunk,
            last=0,
            input_ids=actions,
            attention_mask=mask,
            position_ids=position_ids(mask)[:, size:],
            past_key_values=filled.cache,
            use_cache=True,
        )
        hidden = torch.cat([filled.hidden_states[filled.prompt_index], following], dim=1)
        yield loss_of(hidden[row][part.action_mask])


def packed(limit: int) -> Callable[[nn.Module, Rows], Iterator[Tensor]]:
    """Return the form that computes a tree in rows of `limit` tokens; the tree is built too."""

    def losses(trunk: nn.Module, rows: Rows) -> Iterator[Tensor]:
        tree = prefix_tree(*rows, limit=limit)
        yield loss_of(tree.of_tokens(forward_tree(trunk, tree))[rows.action_mask])

    return losses


def loss_of(hidden: Tensor) -> Tensor:
    return hidden.square().sum() / 1e6


FORMS: dict[str, Callable[[nn.Module, Rows], Iterator[Tensor]]] = {
    PLAIN: plain,
    PROMPTS_ONCE: prompts_once,
} | {f"tree, {limit}": packed(limit) for limit in LIMITS}


def timed(form: str, trunk: nn.Module, rows: Rows, gradient: bool) -> tuple[float, float]:
    """Return the loss and the seconds of its forward, and backward with `gradient`."""
    start, total = time.perf_counter(), 0.0
    with torch.set_grad_enabled(gradient):
        for loss in FORMS[form](trunk, rows):
            if gradient:
                loss.backward()
            total += float(loss.detach())
    return total, time.perf_counter() - start


def tokens(rows: Rows) -> dict[str, int]:
    """Count tokens: of all rows, with distinct prompts once, and of the tree."""
    actions = int(rows.action_mask[:, 1:].sum())
    prompts = torch.where(rows.prompt_mask, rows.prompt_ids, -1).unique(dim=0)
    return {
        "plain_tokens": int(rows.prompt_mask.sum()) + actions,
        "prompts_once_tokens": int((prompts >= 0).sum()) + actions,
        "tree_tokens": len(prefix_tree(*rows).nodes.token),
    }


def measure(models: list[str], rounds: int) -> pd.DataFrame:
    """Measure every form, workload and model, forward and backward and forward alone."""
    measured = []
    for model in models:
        with tempfile.TemporaryDirectory() as parent:
            policy = policy_with_lora(model_folder(Path(parent), model))
        trunk = trunk_of(policy.model)
        for name, rows in workloads(policy).items():
            timed(f"tree, {PACKED_TOKENS}", trunk, rows, True)  # allocates gradients and memory
            for _ in range(rounds):
                for gradient in (True, False):
                    losses = set()
                    for form in FORMS:
                        loss, seconds = timed(form, trunk, rows, gradient)
                        losses.add(loss)
                        kind = "forward and backward" if gradient else "forward"
                        row = {"model": model, "workload": name, "form": form, "pass": kind}
                        measured.append(row | {"seconds": seconds} | tokens(rows))
                        print(model, name, form, kind, f"{seconds:.3f} s", flush=True)
                    assert max(losses) - min(losses) < 1e-3 * max(losses), losses
    return pd.DataFrame(measured)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return tokens, median seconds, and ratios of the tree's to the other forms' seconds."""
    keys = ["model", "workload", "pass"]
    counts = rows.groupby(keys, sort=False)[[c for c in rows if c.endswith("_tokens")]].first()
    medians = rows.groupby([*keys, "form"], sort=False)["seconds"].median().unstack()[list(FORMS)]
    tree = medians[f"tree, {PACKED_TOKENS}"]
    ratios = {f"tree / {form}": tree / medians[form] for form in (PLAIN, PROMPTS_ONCE)}
    return counts.join(medians).assign(**ratios).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=ALL_MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    keep_freed_memory()
    rows = measure(given.models, given.rounds)
    write(given.out, "tree", rows, table(rows))


if __name__ == "__main__":
    main()
