"""The tree of prefixes against plain lists of tokens, on random rows."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etpo.models.prefix_tree import prefix_tree

PAD = 1  # also an ordinary token
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)
batches = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=12)
limits = st.integers(1, 20)
many = settings(max_examples=150, deadline=None, derandomize=True)


def padded(rows, left):
    """Return ids and mask of rows, padded on the left or right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, each in enumerate(rows):
        at = slice(width - len(each), None) if left else slice(len(each))
        ids[row, at], mask[row, at] = torch.tensor(each), True
    return ids, mask


def build(batch, limit=256):
    prompts, actions = zip(*batch, strict=True)
    return prefix_tree(*padded(prompts, left=True), *padded(actions, left=False), limit=limit)


def prefixes_of(batch):
    """Return (row, place, prefix before the token, token) of every token of the actions."""
    return [
        (row, place, (*prompt, *action[:place]), token)
        for row, (prompt, action) in enumerate(batch)
        for place, token in enumerate(action)
    ]


def ancestors(tree, node):
    """Return the nodes from the root to `node`, by the ranges of their descendants."""
    return [n for n in range(node + 1) if node < tree.nodes.end[n]]


def spelled(tree, node):
    return tuple(tree.nodes.token[ancestors(tree, node)].tolist())


@many
@given(batches)
def test_nodes_are_the_distinct_prefixes_in_depth_first_order(batch):
    tree = build(batch)
    read = {prefix[:size] for *_, prefix, _ in prefixes_of(batch) for size in range(1, 99)}
    found = [spelled(tree, node) for node in range(len(tree.nodes.token))]
    assert len(found) == len(read)
    assert set(found) == read
    assert tree.nodes.depth.tolist() == [len(each) - 1 for each in found]
    for node, end in enumerate(tree.nodes.end.tolist()):
        under = [n for n, each in enumerate(found) if each[: len(found[node])] == found[node]]
        assert under == list(range(node, end))


@many
@given(batches)
def test_every_token_has_its_prefix_and_its_place_among_the_tokens_after_it(batch):
    tree, every = build(batch), prefixes_of(batch)
    numbers, followed = {}, {}
    for row, place, prefix, token in every:
        number = int(tree.prefix[row, place])
        assert spelled(tree, tree.node[number]) == prefix
        assert numbers.setdefault(prefix, number) == number
        after, which = divmod(int(tree.child[row, place]), tree.taken.shape[1])
        assert after == number
        assert tree.taken[number, which] == token
        followed.setdefault(number, set()).add((which, token))
    assert sorted(numbers.values()) == list(range(len(tree.node)))
    for number, pairs in followed.items():  # one place for each different token
        places, different = zip(*pairs, strict=True)
        assert len(set(places)) == len(set(different)) == len(pairs)
        assert set(tree.taken[number].tolist()) == set(different)
    assert tree.taken.shape[1] == max(map(len, followed.values()))
    width = tree.mask.shape[1]
    at = {row * width + place: prefix for row, place, prefix, _ in every}
    assert [numbers[at[first]] for first in tree.first.tolist()] == list(range(len(numbers)))


@many
@given(batches, st.integers(0, 99))
def test_values_are_mapped_to_tokens_and_summed_back(batch, seed):
    tree, every = build(batch), prefixes_of(batch)
    generator = torch.Generator().manual_seed(seed)
    size, after = tree.taken.shape
    values = torch.rand(size, 2, generator=generator)
    of_pairs = torch.rand(size, after, generator=generator)
    of_tokens = torch.rand(tree.mask.shape, generator=generator).double()
    tokens, taken = tree.of_tokens(values), tree.of_taken(of_pairs)
    assert not tokens[~tree.mask].any()
    assert not taken[~tree.mask].any()
    by_prefix, by_pair = {}, {}
    for row, place, prefix, token in every:
        number = int(tree.prefix[row, place])
        assert torch.equal(tokens[row, place], values[number])
        (places,) = np.nonzero(tree.taken[number].numpy() == token)
        assert taken[row, place] in of_pairs[number, places]
        value = float(of_tokens[row, place])
        by_prefix[prefix] = by_prefix.get(prefix, 0.0) + value
        by_pair[prefix, token] = by_pair.get((prefix, token), 0.0) + value
    sums, pairs = tree.sum_to_prefixes(of_tokens), tree.sum_to_taken(of_tokens)
    for row, place, prefix, token in every:
        assert float(sums[tree.prefix[row, place]]) == pytest.approx(by_prefix[prefix])
        assert float(tree.of_taken(pairs)[row, place]) == pytest.approx(by_pair[prefix, token])
    assert float(sums.sum()) == pytest.approx(float(of_tokens[tree.mask].sum()))
    assert float(pairs.sum()) == pytest.approx(float(of_tokens[tree.mask].sum()))


@many
@given(batches, limits)
def test_stages_compute_each_node_once_after_its_ancestors(batch, limit):
    tree = build(batch, limit)
    done = set()
    for stage in tree.nodes.stages:
        now = []
        for row, context in zip(stage.nodes.tolist(), stage.context.tolist(), strict=True):
            row, context = ([n for n in each if n >= 0] for each in (row, context))
            assert set(context) <= done
            assert len(set(context + row)) == len(context + row)
            for place, node in enumerate(row):
                assert set(ancestors(tree, node)) <= {*context, *row[: place + 1]}
            now += row
        assert len(set(now)) == len(now)
        assert not done & set(now)
        done |= set(now)
    assert done == set(range(len(tree.nodes.token)))


@many
@given(batches, limits)
def test_rows_keep_the_limit(batch, limit):
    """Nodes before the last stage have more descendants than fit in a row."""
    tree = build(batch, limit)
    size = tree.nodes.end - torch.arange(len(tree.nodes.end))
    *upper, last = tree.nodes.stages
    assert last.nodes.shape[1] <= limit
    assert all(size[node] <= limit for node in last.nodes[last.nodes >= 0])
    for stage in upper:
        assert all(size[node] > limit for node in stage.nodes[stage.nodes >= 0])
        for row in stage.nodes.tolist():
            row = [n for n in row if n >= 0]
            for one, other in itertools.pairwise(row):  # a path without a branch
                assert ancestors(tree, other) == [*ancestors(tree, one), other]
                beyond = [n for n in range(one + 1, tree.nodes.end[one]) if size[n] > limit]
                depth = tree.nodes.depth[one] + 1
                assert [n for n in beyond if tree.nodes.depth[n] == depth] == [other]
    if limit >= len(tree.nodes.token):
        assert tree.nodes.stages[0].nodes.shape == (1, len(tree.nodes.token))
        assert tree.nodes.stages[0].context.shape == (1, 0)


@many
@given(batches)
def test_paths_lead_to_every_leaf(batch):
    tree = build(batch)
    leaves = [n for n, end in enumerate(tree.nodes.end.tolist()) if end == n + 1]
    paths = [[n for n in path if n >= 0] for path in tree.paths.tolist()]
    assert sorted(path[-1] for path in paths) == leaves
    assert all(path == ancestors(tree, path[-1]) for path in paths)


def test_a_tree_by_hand():
    # the first and third row have one prompt; the fourth is another prompt with the same tokens
    batch = [([5, 6], [7, 8]), ([5], [9]), ([5, 6], [7, 9, 4]), ([5, 6, 7], [9, 3])]
    tree = build(batch)
    assert tree.nodes.token.tolist() == [5, 6, 7, 9]
    assert tree.nodes.depth.tolist() == [0, 1, 2, 3]
    assert tree.node.tolist() == [0, 1, 2, 3]
    assert tree.prefix.tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 3], [2, 3, 0]]
    assert tree.taken.tolist() == [[9, 9], [7, 7], [8, 9], [3, 4]]
    assert tree.child.tolist() == [[2, 4, 0], [0, 0, 0], [2, 5, 7], [5, 6, 0]]
    assert tree.first.tolist() == [3, 0, 1, 8]
    assert tree.paths.tolist() == [[0, 1, 2, 3]]


def test_subtrees_of_one_context_share_a_row():
    prompt = list(range(10, 20))
    batch = [(prompt, [first, 5, 5, 1]) for first in range(6)]
    tree = build(batch, limit=8)
    above, below = tree.nodes.stages
    assert above.nodes.tolist() == [list(range(10))]
    assert below.nodes.shape == (3, 6)  # two actions of three tokens fit
    assert (below.context == torch.arange(10)).all()
    assert [len(build(batch, limit).nodes.stages) for limit in (27, 28)] == [2, 1]


def test_another_limit_changes_the_stages_alone():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, (20, 24), generator=generator).tolist()
    one, other = (build([(row[:9], row[9:]) for row in rows], limit) for limit in (4, 300))
    assert len(one.nodes.stages) > len(other.nodes.stages)
    for name in set(one._fields) - {"nodes"}:
        assert torch.equal(getattr(one, name), getattr(other, name))
    for values, others in zip(one.nodes[:3], other.nodes[:3], strict=True):
        assert torch.equal(values, others)
