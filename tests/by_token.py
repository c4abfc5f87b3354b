"""Hidden states and distributions at every token of rows of actions: [B, L, ...]."""

import torch

from etpo.models.prefix_tree import prefix_tree


def tree_of(prompt_ids, prompt_mask, action_ids, action_mask=None, **options):
    """Build the tree of rows; without a mask all L tokens are taken."""
    if action_mask is None:
        action_mask = torch.ones_like(action_ids, dtype=torch.bool)
    return prefix_tree(prompt_ids, prompt_mask, action_ids, action_mask, **options)


def hidden_states(policy, prompt_ids, prompt_mask, action_ids, reference=False):
    """Compute the hidden states [B, L, D] before each token."""
    tree = tree_of(prompt_ids, prompt_mask, action_ids)
    return tree.of_tokens(policy.hidden_states(tree, reference))


def log_probs(policy, prompt_ids, prompt_mask, action_ids, reference=False, **options):
    """Compute log pi [B, L, V] before each token; `min_p` keeps the taken ones."""
    hidden = hidden_states(policy, prompt_ids, prompt_mask, action_ids, reference)
    taken = action_ids[..., None]
    return policy.log_probs(hidden, taken, reference=reference, **options).log_probs


def critic_outputs(critic, policy, prompt_ids, prompt_mask, action_ids):
    """Compute the outputs of a critic before each token: [B, L] and [B, L, V]."""
    tree = tree_of(prompt_ids, prompt_mask, action_ids)
    outputs = critic(tree, policy.hidden_states(tree, reference=True))
    if torch.is_tensor(outputs):
        return tree.of_tokens(outputs)
    return tuple(x if x is None else tree.of_tokens(x) for x in outputs)


def gather_tokens(values, tokens):
    """Return the entries of tokens [...] in values [..., V]: [...]."""
    return values.gather(-1, tokens[..., None])[..., 0]
