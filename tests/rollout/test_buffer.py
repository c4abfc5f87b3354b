from typing import NamedTuple

import torch
from torch import Tensor

from etpo.rollout.buffer import distinct_rows, split_by_length


class Batch(NamedTuple):
    prompt_ids: Tensor
    prompt_mask: Tensor
    action_mask: Tensor
    q: Tensor
    weights: Tensor
    absent: Tensor | None = None


def test_parts_hold_every_action_once_and_no_common_padding():
    prompts, lengths = torch.tensor([5, 2, 3, 4, 5]), torch.tensor([1, 6, 2, 6, 3])
    prompt_mask = torch.arange(7) >= 7 - prompts[:, None]
    action_mask = torch.arange(8) < lengths[:, None]
    batch = Batch(
        torch.arange(35).view(5, 7), prompt_mask, action_mask, torch.rand(5, 8, 3), torch.arange(5)
    )
    parts = split_by_length(batch, 2)
    assert all(part.absent is None for part in parts)
    assert [part.weights.tolist() for part in parts] == [[0, 2, 4], [1, 3]]
    assert [part.action_mask.shape[1] for part in parts] == [3, 6]
    assert [part.prompt_mask.shape[1] for part in parts] == [5, 4]
    for part in parts:
        for place, row in enumerate(part.weights):
            ids, mask = part.prompt_ids[place], part.prompt_mask[place]
            assert torch.equal(ids[mask], batch.prompt_ids[row][prompt_mask[row]])
            valid = part.action_mask[place]
            assert torch.equal(part.q[place][valid], batch.q[row][action_mask[row]])


def test_few_actions_make_few_parts():
    mask = torch.ones(1, 2, dtype=torch.bool)
    (part,) = split_by_length(Batch(mask.long(), mask, mask, mask, torch.ones(1)), 4)
    assert part.action_mask.shape == (1, 2)


class Rows(NamedTuple):
    prompt_ids: Tensor
    prompt_mask: Tensor
    action_ids: Tensor
    action_mask: Tensor
    number: Tensor


def test_distinct_rows_are_the_first_of_equal_prompts_and_actions():
    prompts = torch.tensor([[0, 7], [7, 7], [0, 7], [0, 7], [0, 7], [0, 7]])
    prompt_mask = torch.tensor([[0, 1], [1, 1], [0, 1], [0, 1], [1, 1], [0, 1]]).bool()
    actions = torch.tensor([[5, 6], [5, 6], [5, 6], [5, 0], [5, 6], [5, 0]])
    action_mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    batch = Rows(prompts, prompt_mask, actions, action_mask, torch.arange(6))
    distinct, index = distinct_rows(batch)
    assert distinct.number[index].tolist() == [0, 1, 0, 3, 4, 5]
    assert sorted(distinct.number.tolist()) == [0, 1, 3, 4, 5]
