"""Sets of tokens as bits, and the columns of distributions over some of the vocabulary.

Bits are int32 [..., W], token i at bit i % 32 of word i // 32, as in XGrammar; W = 0 stands for the
whole vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WHOLE = 0.5  # share of the vocabulary from which all columns are computed


class TokenColumns(NamedTuple):
    """Tokens over which distributions at n prefixes are computed; None: all of the vocabulary.

    ids: int64 [U]. allowed: bool [n, U], the action space. support: bool [n, U], tokens with a
    probability under the policy that sampled; None: the ones that `min_p` keeps.
    """

    ids: Tensor | None = None
    allowed: Tensor | None = None
    support: Tensor | None = None

    @classmethod
    def of(
        cls, vocabulary_size: int, allowed: Tensor, support: Tensor | None = None
    ) -> "TokenColumns":
        """Return the columns of `allowed` [n, W] with the `support` [n, W] among them."""
        ids = columns_of(allowed, vocabulary_size)
        within = None if allowed.shape[-1] == 0 else unpack(allowed, ids, vocabulary_size)
        if support is None or support is allowed or support.shape[-1] == 0:
            return cls(ids, within, None if support is None else within)
        return cls(ids, within, unpack(support, ids, vocabulary_size))

    def supported(self) -> "TokenColumns":
        """Return the columns with the support as action space."""
        return TokenColumns(self.ids, self.support, self.support)

    def places(self, tokens: Tensor) -> Tensor:
        """Return the columns of `tokens` [...]."""
        return tokens if self.ids is None else torch.searchsorted(self.ids, tokens)


ALL_TOKENS = TokenColumns()


def columns_of(bits: Tensor, vocabulary_size: int) -> Tensor | None:
    """Return the tokens in any of the sets [n, W], or None if they are most of the vocabulary."""
    if bits.shape[-1] == 0:
        return None
    while len(bits) > 1:  # PyTorch has no reduction of bits
        half = len(bits) // 2
        bits = torch.cat([bits[:half] | bits[half : 2 * half], bits[2 * half :]])
    ids = unpack(bits[0], None, vocabulary_size).nonzero()[:, 0]
    return None if len(ids) > WHOLE * vocabulary_size else ids


def unpack(bits: Tensor, ids: Tensor | None, vocabulary_size: int) -> Tensor:
    """Return whether tokens are in the sets: int32 [..., W] -> bool [..., U] of `ids`, or all."""
    if ids is None:
        ids = torch.arange(vocabulary_size, device=bits.device)
    return (bits[..., ids >> 5] >> (ids & 31)) & 1 == 1


def pack_ids(tokens: Tensor, vocabulary_size: int) -> Tensor:
    """Return sets of tokens as bits: int64 [n, C] -> int32 [n, W]."""
    bits = tokens.new_zeros(len(tokens), -(-vocabulary_size // 32), dtype=torch.int32)
    rows = torch.arange(len(tokens), device=tokens.device)
    for token in tokens.unbind(1):
        bits[rows, token >> 5] |= (1 << (token & 31)).to(torch.int32)
    return bits


def pack(mask: Tensor, ids: Tensor | None, vocabulary_size: int) -> Tensor:
    """Return sets of tokens as bits: bool [n, U] of the tokens `ids`, or of all -> int32 [n, W]."""
    words = -(-vocabulary_size // 32)
    whole = mask.new_zeros(len(mask), words * 32)
    if ids is None:
        whole[:, : mask.shape[1]] = mask
    else:
        whole[:, ids] = mask
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    octets = (whole.view(len(mask), words, 4, 8) * weights).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32).squeeze(-1)
