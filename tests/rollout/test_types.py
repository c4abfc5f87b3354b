"""Selecting rows of actions and of training batches."""

import torch

from etpo.models.prefix_tree import prefix_tree
from etpo.rollout.types import PrefixStates, TokenBatch

from ..by_token import actions_of, any_token

PROMPTS, LENGTHS = torch.tensor([3, 2, 3, 3, 2, 1]), torch.tensor([4, 4, 2, 4, 1, 3])
PROMPT_MASK = torch.arange(3) >= 3 - PROMPTS[:, None]
ACTION_MASK = torch.arange(4) < LENGTHS[:, None]


def token_batch():
    """Return a batch whose states and values of prefixes identify them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, (6, 7), generator=generator)
    inputs = ids[:, :3], PROMPT_MASK, ids[:, 3:], ACTION_MASK
    tree = prefix_tree(*inputs)
    prefixes = torch.arange(len(tree.node)).float()[:, None]
    log_probs = tree.of_taken(torch.arange(tree.taken.numel()).view(tree.taken.shape).float())
    sets = prefixes.int() << 8
    states = PrefixStates(prefixes, 2 * prefixes, sets, sets + 1, 4 * prefixes[:, 0], 3 * prefixes)
    weights = torch.arange(6.0)
    numbers = {"weights": weights, "sample_weights": log_probs}
    return TokenBatch(*inputs, *[log_probs] * 4, **numbers, tree=tree, states=states)


def test_rows_keep_their_tokens_and_the_states_of_their_prefixes():
    batch = token_batch()
    for rows in (torch.tensor([4]), torch.tensor([5, 0, 3]), torch.tensor([2, 2, 1])):
        part = batch.select(rows)
        assert part.weights.tolist() == rows.tolist()
        assert part.action_values is None
        for name in ("action_ids", "step_mask", "prompt_ids", "prompt_mask", "returns"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[rows])
        assert torch.equal(part.tree.mask, ACTION_MASK[rows])
        for one, other in zip(part.states, batch.states, strict=True):
            expected = batch.tree.of_tokens(other)[rows]
            assert torch.equal(part.tree.of_tokens(one), expected)
            assert len(one) == len(part.tree.node) == len(expected[ACTION_MASK[rows]].unique())
    whole = batch.states._replace(support=any_token(len(batch.tree.node)))
    part = batch._replace(states=whole).select(rows)
    assert part.states.support.shape == (len(part.tree.node), 0)


def test_the_tree_of_selected_actions_is_of_their_tokens_alone():
    ids = torch.arange(42).view(6, 7)
    actions = actions_of(ids[:, :3], PROMPT_MASK, ids[:, 3:], ACTION_MASK)
    part = actions.select(torch.tensor([4, 1]))
    assert torch.equal(part.action_ids, actions.action_ids[[4, 1]])
    tree = part.tree()
    assert sorted(tree.nodes.token.tolist()) == [8, 9, 10, 11, 12, 29, 30]  # no last token
    assert torch.equal(tree.mask, ACTION_MASK[[4, 1]])
