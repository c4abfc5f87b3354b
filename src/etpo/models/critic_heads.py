"""Heads of critics: a value, or a value and advantages over the vocabulary."""

from typing import Any

import torch
from torch import Tensor, nn

from etpo.models.chunked_logits import project_to_vocabulary


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Set weights and bias to exactly zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ValueHead(nn.Module):
    """Hidden states [..., D] -> value [...], initially exactly zero.

    float32 in mixed precision too: bfloat16 values near 1 have steps of 0.004.
    """

    def __init__(
        self,
        input_size: int,
        vocabulary_size: int,
        hidden_size: int,
        embeddings: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(input_size), nn.Linear(input_size, hidden_size), nn.GELU()
        )
        self.value = zero_init(nn.Linear(hidden_size, 1))

    def forward(self, hidden: Tensor, ids: Tensor | None = None) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outputs(self.body(hidden.float()), ids)

    def outputs(self, hidden: Tensor, ids: Tensor | None) -> Any:
        """Compute the outputs from outputs of the body [..., hidden_size]."""
        return self.value(hidden).squeeze(-1)


class DuelingHead(ValueHead):
    """Hidden states [..., D] -> (value [...], advantage [..., V] or of `ids` [U]), both float32.

    Q(x, w) = value + advantage(w) - E_pi[advantage] (Wang et al., arXiv 1511.06581). Both outputs
    are initially zero.

    embeddings: A frozen LM head [V, D]. The advantage of a token is the product of its row with a
        trained query [..., D], so that no weights grow with the vocabulary and similar tokens have
        similar values. None: trained rows [V, hidden_size]; the advantage of a token that is never
        sampled stays 0.
    """

    def __init__(
        self,
        input_size: int,
        vocabulary_size: int,
        hidden_size: int,
        embeddings: nn.Module | None = None,
    ) -> None:
        super().__init__(input_size, vocabulary_size, hidden_size)
        self.vocabulary_size, self.embeddings = vocabulary_size, embeddings
        outputs = vocabulary_size if embeddings is None else embeddings.weight.shape[1]
        self.advantage = zero_init(nn.Linear(hidden_size, outputs))
        if embeddings is not None:  # a step of the query moves advantages as one of trained rows
            weight = embeddings.weight
            self.scale = 1 / (outputs * float(weight.float().square().mean().sqrt()))

    def outputs(self, hidden: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        value = super().outputs(hidden, ids)
        if self.embeddings is None:
            return value, project_to_vocabulary(self.advantage, hidden, ids)
        query = self.scale * self.advantage(hidden)
        weight = (
            self.embeddings.weight[: self.vocabulary_size]
            if ids is None
            else self.embeddings.weight[ids]
        )
        return value, query @ weight.float().T


class FoldHeads(nn.ModuleList):
    """Dueling heads, one per fold."""

    def forward(self, hidden: Tensor, ids: Tensor | None, fold: Tensor) -> Any:
        """Return the outputs of the head of each row's fold; hidden: [N, C], fold: int64 [N]."""
        rows = [(fold == number).nonzero()[:, 0] for number in range(len(self))]
        parts = zip(
            *(head(hidden[each], ids) for head, each in zip(self, rows, strict=True)), strict=True
        )
        back = torch.argsort(torch.cat(rows))
        return tuple(torch.cat(part)[back] for part in parts)
