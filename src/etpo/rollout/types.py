"""Data types of rollouts and training batches: B actions, P prompt tokens, L action tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from etpo.environments.text_env import TextObservation
from etpo.models.prefix_tree import PrefixTree, prefix_tree


class Actions(NamedTuple):
    """Actions of one policy iteration, ordered by round, then by environment.

    Prompts are left-padded, actions right-padded. An action ends with a stop token or at the length
    limit. Steps are the tokens that were drawn, at least one per action; an action space may have
    forced others. `allowed` and `support` are sets of tokens as bits (`token_columns`); W = 0
    stands for the whole vocabulary.
    """

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    step_mask: Tensor  # bool [B, L]
    hidden_states: Tensor  # [B, L, D], policy outputs at the steps, recorded during generation
    allowed: Tensor  # int32 [B, L, W], the action space at the steps
    support: Tensor  # int32 [B, L, W], tokens with a probability at the steps
    rewards: Tensor  # float32 [B]
    terminated: Tensor  # bool [B], true if the episode ended; the next value is 0
    truncated: Tensor  # bool [B], true if the episode was cut; the next value is bootstrapped
    step: Tensor  # int64 [B], index of the action in its episode, from 0

    def select(self, rows: Tensor) -> "Actions":
        """Return the actions `rows` [b]."""
        return Actions(*(x[rows.to(x.device)] for x in self))

    def tree(self, fold: Tensor | None = None) -> PrefixTree:
        """Build the tree of the prefixes of the steps; fold: int64 [B]."""
        prompts = self.prompt_ids, self.prompt_mask
        return prefix_tree(*prompts, self.action_ids, self.step_mask, fold)


class Decisions(NamedTuple):
    """Prompts with the first step of an action that is not taken; `tokens` are placeholders.

    Fields as in `Actions`.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    action_ids: Tensor
    step_mask: Tensor
    allowed: Tensor

    def tree(self, fold: Tensor | None = None) -> PrefixTree:
        """Build the tree of the prefixes of the steps; fold: int64 [B]."""
        return prefix_tree(*self[:4], fold)


class Record(NamedTuple):
    """One action in readable form; a line of `episodes.jsonl`.

    length_limited: true if `max_new_tokens` was reached before a stop token or stop string.
    observation: from which `prompt` was rendered.
    """

    env: int
    attempt: int
    prompt: str
    action: str
    reward: float
    error: str | None
    cached: bool
    length_limited: bool = False
    observation: TextObservation | None = None


class Rollout(NamedTuple):
    """Actions, readable records and timings.

    bootstrap: of the true next observations of the truncated actions, in their order; None if there
    are none. records: of the fresh actions, which come first; replayed actions of earlier
    iterations follow. replayed_log_mu: float32 [B - num_fresh, L], log-probabilities of the
    replayed actions' tokens under the policies that sampled them; None without such actions.
    states: of an earlier evaluation by the present policy, so that only the critic computes again.
    """

    actions: Actions
    bootstrap: Decisions | None
    records: list[Record]
    num_envs: int
    dropped_prompt_tokens: int
    generate_seconds: float
    score_seconds: float
    replayed_log_mu: Tensor | None = None
    states: "PrefixStates | None" = None

    @property
    def num_fresh(self) -> int:
        """Number of actions that the present policy sampled."""
        replayed = 0 if self.replayed_log_mu is None else len(self.replayed_log_mu)
        return len(self.actions.rewards) - replayed


class PrefixStates(NamedTuple):
    """Hidden states and token sets of N prefixes, without gradient."""

    old: Tensor  # [N, D], of the policy at the start of the iteration
    ref: Tensor  # [N, D], of the reference
    allowed: Tensor  # int32 [N, W], as in `Actions`
    support: Tensor  # int32 [N, W], as in `Actions`
    ref_log_mass: Tensor  # float32 [N], log of the reference's probability of the support
    critic: Tensor  # [N, C], of the target critic; C = 0 without one

    def select(self, prefixes: Tensor) -> "PrefixStates":
        """Return the states of `prefixes` [n]."""
        return PrefixStates(*(x[prefixes] for x in self))


class TokenBatch(NamedTuple):
    """Training batch of an on-policy algorithm; no tensor carries a gradient.

    `tree` has the N distinct prefixes of the steps of B actions, `states` their hidden states.
    Numbers of tokens are [B, L], 0 where there is no step. `old` is the policy at the start of the
    iteration, which sampled the fresh actions, `ref` the frozen reference.
    """

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    step_mask: Tensor  # bool [B, L]
    old_log_probs: Tensor  # float32 [B, L], of the taken tokens
    ref_log_probs: Tensor  # float32 [B, L], of the taken tokens
    advantages: Tensor  # float32 [B, L]
    returns: Tensor  # float32 [B, L], regression targets of the critic
    weights: Tensor  # float32 [B], weight of the action in the policy objective
    sample_weights: Tensor  # float32 [B, L], min(c, pi_old/mu) of the taken steps, 1 of fresh ones
    tree: PrefixTree
    states: PrefixStates
    action_values: Tensor | None = None  # float32 [B], Q(o, a) of the target critic
    fold: Tensor | None = None  # int64 [B], half of the environments, if the critic is cross-fitted
    critic_only: bool = False  # no update of the policy

    def select(self, rows: Tensor) -> "TokenBatch":
        """Return the actions `rows` [b] with the tree of their own prefixes."""
        fields: dict[str, Any] = {
            name: x[rows.to(x.device)] for name, x in self._asdict().items() if torch.is_tensor(x)
        }
        tree = prefix_tree(
            fields["prompt_ids"],
            fields["prompt_mask"],
            fields["action_ids"],
            fields["step_mask"],
            fields.get("fold"),
        )
        prefixes = self.tree.prefix[rows.to(tree.first.device)].flatten()[tree.first]
        return self._replace(**fields, tree=tree, states=self.states.select(prefixes))


Rows = TypeVar("Rows", Actions, Decisions)


def stack(blocks: Sequence[Rows], pad_id: int) -> Rows:
    """Concatenate batches of actions or decisions, in their order."""
    kind = type(blocks[0])
    fields = {}
    for name in kind._fields:
        parts: list[Tensor] = [getattr(block, name) for block in blocks]
        value = pad_id if name.endswith("_ids") else 0
        if name in ("allowed", "support"):  # none of a round without an action space: all tokens
            words = max(part.shape[-1] for part in parts)
            parts = [widened(part, words) for part in parts]
        fields[name] = pad_stack(parts, value, left=name.startswith("prompt"))
    return kind(**fields)


def widened(sets: Tensor, words: int) -> Tensor:
    """Return sets of tokens [B, L, words]; sets of W = 0 words are of all tokens."""
    return sets if sets.shape[-1] else sets.new_full((*sets.shape[:2], words), -1)


def pad_stack(blocks: Sequence[Tensor], value: float, *, left: bool) -> Tensor:
    """Concatenate [b, ...] or [b, T_i, ...] to [sum b, max T, ...], padded with `value`."""
    width = max(block.shape[1] if block.ndim > 1 else 0 for block in blocks)
    padded = []
    for block in blocks:
        gap = width - block.shape[1] if block.ndim > 1 else 0
        edges = (0, 0) * (block.ndim - 2) + ((gap, 0) if left else (0, gap))
        padded.append(torch.nn.functional.pad(block, edges, value=value) if gap else block)
    return torch.cat(padded)
