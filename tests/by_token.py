"""Rows of actions, and hidden states and distributions at every token of them: [B, L, ...]."""

import torch

from etpo.models.prefix_tree import prefix_tree
from etpo.models.token_columns import TokenColumns, unpack
from etpo.rollout.types import Actions, Decisions, PrefixStates


def any_token(*shape):
    """Return sets of all tokens as bits: int32 [..., 0]."""
    return torch.zeros(*shape, 0, dtype=torch.int32)


def actions_of(prompt_ids, prompt_mask, action_ids, action_mask, **fields):
    """Return `Actions` that any token may follow, one episode each; `fields` replace defaults."""
    rows, none = len(action_ids), torch.zeros(len(action_ids))
    defaults = {
        "step_mask": action_mask,
        "hidden_states": none[:, None, None].expand(*action_ids.shape, 1),
        "allowed": any_token(*action_ids.shape),
        "support": any_token(*action_ids.shape),
        "rewards": none,
        "terminated": torch.ones(rows, dtype=torch.bool),
        "truncated": torch.zeros(rows, dtype=torch.bool),
        "step": none.long(),
    }
    return Actions(prompt_ids, prompt_mask, action_ids, action_mask, **(defaults | fields))


def decisions_of(prompt_ids, prompt_mask):
    """Return the first steps of actions that may be any text."""
    ids = torch.zeros_like(prompt_ids[:, :1])
    return Decisions(prompt_ids, prompt_mask, ids, ids == 0, any_token(*ids.shape))


def states_of(old, ref=None, critic=None):
    """Return `PrefixStates` of prefixes that any token may follow; without `ref` both are `old`."""
    sets, mass = any_token(len(old)), torch.zeros(len(old))
    critic = old[:, :0] if critic is None else critic
    return PrefixStates(old, old if ref is None else ref, sets, sets, mass, critic)


def whole_columns(policy, states):
    """Return the whole vocabulary as columns, with the support of the policy that sampled."""
    if states.support.shape[-1] == 0:
        return TokenColumns()
    support = unpack(states.support, None, policy.vocabulary_size)
    return TokenColumns(None, support, support)


def unpadded(actions, row):
    """Return prompt and action [1, ...] of a row, and the prompt's mask."""
    prompt = actions.prompt_ids[row][actions.prompt_mask[row]][None]
    action = actions.action_ids[row][actions.action_mask[row]][None]
    return prompt, torch.ones_like(prompt).bool(), action


def tree_of(prompt_ids, prompt_mask, action_ids, step_mask=None, **options):
    """Build the tree of rows; without a mask all L tokens are steps."""
    if step_mask is None:
        step_mask = torch.ones_like(action_ids, dtype=torch.bool)
    return prefix_tree(prompt_ids, prompt_mask, action_ids, step_mask, **options)


def hidden_states(policy, prompt_ids, prompt_mask, action_ids, reference=False):
    """Compute the hidden states [B, L, D] before each token."""
    tree = tree_of(prompt_ids, prompt_mask, action_ids)
    return tree.of_tokens(policy.hidden_states(tree, reference))


def log_probs(policy, prompt_ids, prompt_mask, action_ids, reference=False, **sets):
    """Compute log pi [B, L, V] before each token; see `distribution`."""
    inputs = prompt_ids, prompt_mask, action_ids
    return distribution(policy, *inputs, reference=reference, **sets).log_probs


def distribution(policy, prompt_ids, prompt_mask, action_ids, reference=False, **sets):
    """Compute the distributions before each token; `min_p` keeps the taken ones.

    sets: `allowed` and `support`, bool [B, L, V], as of `TokenColumns`.
    """
    hidden = hidden_states(policy, prompt_ids, prompt_mask, action_ids, reference)
    columns, taken = TokenColumns(**sets), action_ids[..., None]
    return policy.log_probs(hidden, columns, taken=taken, reference=reference)


def critic_outputs(critic, policy, prompt_ids, prompt_mask, action_ids):
    """Compute the outputs of a critic before each token: [B, L] and [B, L, V]."""
    tree = tree_of(prompt_ids, prompt_mask, action_ids)
    states = (policy.hidden_states(tree, reference) for reference in (True, False))
    outputs = critic(tree, *states)
    if torch.is_tensor(outputs):
        return tree.of_tokens(outputs)
    return tuple(x if x is None else tree.of_tokens(x) for x in outputs)


def gather_tokens(values, tokens):
    """Return the entries of tokens [...] in values [..., V]: [...]."""
    return values.gather(-1, tokens[..., None])[..., 0]
