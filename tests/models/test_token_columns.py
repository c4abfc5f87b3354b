"""Token sets as bits, and the columns of distributions, against sets of Python."""

import pytest
import torch

from etpo.models.token_columns import ALL_TOKENS, TokenColumns, columns_of, pack, unpack

SIZES = (1, 31, 32, 33, 64, 259, 1000)


def random_masks(rows, size, share=0.3):
    generator = torch.Generator().manual_seed(size)
    return torch.rand(rows, size, generator=generator) < share


@pytest.mark.parametrize("size", SIZES)
def test_token_i_is_bit_i_mod_32_of_word_i_div_32(size):
    masks = random_masks(7, size, 0.5)
    masks[0], masks[1] = False, True
    bits = pack(masks, None, size)
    assert bits.dtype == torch.int32
    assert bits.shape == (7, (size + 31) // 32)
    for mask, words in zip(masks.tolist(), bits.tolist(), strict=True):
        number = sum((word % 2**32) << (32 * place) for place, word in enumerate(words))
        assert number == sum(1 << token for token, inside in enumerate(mask) if inside)
    assert torch.equal(unpack(bits, None, size), masks)
    nested = unpack(bits.view(1, 7, -1), None, size)
    assert torch.equal(nested[0], masks)


@pytest.mark.parametrize("size", SIZES)
def test_some_tokens_are_packed_and_unpacked_in_their_order(size):
    ids = random_masks(1, size, 0.6)[0].nonzero()[:, 0]
    masks = random_masks(5, len(ids), 0.5)
    whole = torch.zeros(5, size, dtype=torch.bool)
    whole[:, ids] = masks
    bits = pack(masks, ids, size)
    assert torch.equal(bits, pack(whole, None, size))
    assert torch.equal(unpack(bits, ids, size), masks)
    flipped = ids.flip(0)
    assert torch.equal(unpack(bits, flipped, size), masks.flip(1))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("size", [33, 259, 1000])
def test_columns_are_the_union_of_all_sets(rows, size):
    masks = random_masks(rows, size, 0.2 / rows)
    bits = pack(masks, None, size)
    before = bits.clone()
    expected = [t for t in range(size) if any(row[t] for row in masks.tolist())]
    assert columns_of(bits, size).tolist() == expected
    assert torch.equal(bits, before)


def test_most_of_the_vocabulary_is_all_of_it():
    bits = pack(torch.arange(10)[None] < 5, None, 10)
    assert columns_of(bits, 10).tolist() == [0, 1, 2, 3, 4]
    assert columns_of(pack(torch.arange(10)[None] < 6, None, 10), 10) is None
    assert columns_of(torch.zeros(3, 0, dtype=torch.int32), 10) is None
    # rows without an action space have every bit, those beyond the vocabulary too
    assert columns_of(torch.full((2, 1), -1, dtype=torch.int32), 10) is None
    assert TokenColumns.of(10, torch.zeros(3, 0, dtype=torch.int32)) == ALL_TOKENS


@pytest.mark.parametrize("size", [33, 259])
def test_masks_of_columns(size):
    allowed = random_masks(6, size, 0.05)
    support = allowed & random_masks(6, size, 0.9)
    sets = [pack(mask, None, size) for mask in (allowed, support)]
    columns = TokenColumns.of(size, *sets)
    assert torch.equal(columns.allowed, allowed[:, columns.ids])
    assert torch.equal(columns.support, support[:, columns.ids])
    assert torch.equal(columns.ids[columns.places(columns.ids.flip(0))], columns.ids.flip(0))
    supported = columns.supported()
    assert supported.allowed is supported.support is columns.support
    same = TokenColumns.of(size, sets[0], sets[0])
    assert same.allowed is same.support
    assert TokenColumns.of(size, sets[0]).support is None


def test_a_row_without_an_action_space_is_not_restricted():
    sets = torch.tensor([[-1, -1], [0b110, 0]], dtype=torch.int32)
    columns = TokenColumns.of(40, sets)
    assert columns.ids is None
    assert columns.allowed[0].all()
    assert columns.allowed[1].nonzero()[:, 0].tolist() == [1, 2]
    tokens = torch.tensor([[3], [39]])
    assert columns.places(tokens) is tokens
