"""Data types of rollouts and training batches: B actions, P prompt tokens, L action tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etpo.models.prefix_tree import PrefixTree, prefix_tree


class Actions(NamedTuple):
    """Actions of one policy iteration, ordered by round, then by environment.

    Prompts are left-padded, actions right-padded. An action ends with a stop token or at the length
    limit.
    """

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    hidden_states: Tensor  # [B, L, D], policy outputs recorded during generation
    rewards: Tensor  # float32 [B]
    terminated: Tensor  # bool [B], true if the episode ended; the next value is 0
    truncated: Tensor  # bool [B], true if the episode was cut; the next value is bootstrapped
    step: Tensor  # int64 [B], index of the action in its episode, from 0

    def select(self, rows: Tensor) -> "Actions":
        """Return the actions `rows` [b]."""
        return Actions(*(x[rows.to(x.device)] for x in self))

    def tree(self) -> PrefixTree:
        """Build the tree of the actions' prefixes."""
        return prefix_tree(self.prompt_ids, self.prompt_mask, self.action_ids, self.action_mask)


class Record(NamedTuple):
    """One action in readable form; a line of `episodes.jsonl`.

    length_limited: true if `max_new_tokens` was reached before a stop token or stop string.
    """

    env: int
    attempt: int
    prompt: str
    action: str
    reward: float
    error: str | None
    cached: bool
    length_limited: bool = False


class Rollout(NamedTuple):
    """Actions, next prompts of truncated actions, readable records and timings.

    bootstrap_ids, bootstrap_mask: [B', P'], prompts of the true next observations of the truncated
    actions, in their order.
    """

    actions: Actions
    bootstrap_ids: Tensor
    bootstrap_mask: Tensor
    records: list[Record]
    num_envs: int
    dropped_prompt_tokens: int
    generate_seconds: float
    score_seconds: float


class PrefixStates(NamedTuple):
    """Hidden states of N prefixes, without gradient."""

    old: Tensor  # [N, D], of the policy that sampled
    ref: Tensor  # [N, D], of the reference
    critic: Tensor | None = None  # [N, C], of the target critic

    def select(self, prefixes: Tensor) -> "PrefixStates":
        """Return the states of `prefixes` [n]."""
        critic = None if self.critic is None else self.critic[prefixes]
        return PrefixStates(self.old[prefixes], self.ref[prefixes], critic)


class TokenBatch(NamedTuple):
    """Training batch of an on-policy algorithm; no tensor carries a gradient.

    `tree` has the N distinct prefixes of the B actions, `states` their hidden states. Tokens are
    [B, L]. `old` is the policy that sampled the actions, `ref` the frozen reference.
    """

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    old_log_probs: Tensor  # float32 [B, L], of the taken tokens
    ref_log_probs: Tensor  # float32 [B, L], of the taken tokens
    advantages: Tensor  # float32 [B, L]
    returns: Tensor  # float32 [B, L], regression targets of the critic
    weights: Tensor  # float32 [B], weight of the action in the policy objective
    tree: PrefixTree
    states: PrefixStates
    action_values: Tensor | None = None  # float32 [B], Q(o, a) of the target critic

    def select(self, rows: Tensor) -> "TokenBatch":
        """Return the actions `rows` [b] with the tree of their own prefixes."""
        fields = {
            name: x[rows.to(x.device)] for name, x in self._asdict().items() if torch.is_tensor(x)
        }
        tree = prefix_tree(*(fields[name] for name in TokenBatch._fields[:4]))
        prefixes = self.tree.prefix[rows.to(tree.first.device)].flatten()[tree.first]
        return self._replace(**fields, tree=tree, states=self.states.select(prefixes))


def pad_stack(blocks: Sequence[Tensor], value: float, *, left: bool) -> Tensor:
    """Concatenate [b, ...] or [b, T_i, ...] to [sum b, max T, ...], padded with `value`."""
    width = max(block.shape[1] if block.ndim > 1 else 0 for block in blocks)
    padded = []
    for block in blocks:
        gap = width - block.shape[1] if block.ndim > 1 else 0
        edges = (0, 0) * (block.ndim - 2) + ((gap, 0) if left else (0, gap))
        padded.append(torch.nn.functional.pad(block, edges, value=value) if gap else block)
    return torch.cat(padded)
