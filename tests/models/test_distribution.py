"""Distributions over some columns of the vocabulary."""

import pytest
import torch

from etpo.models.distribution import supported_distribution, token_distribution


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("constrained", [False, True])
def test_the_supported_columns_hold_the_whole_distribution(temperature, constrained):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 40, generator=generator)
    allowed = torch.rand(5, 40, generator=generator) < 0.5 if constrained else None
    whole, _ = token_distribution(logits, temperature, 0.1, allowed=allowed)
    log_probs, places = supported_distribution(logits, temperature, 0.1, allowed)
    assert places.tolist() == whole.isfinite().any(0).nonzero()[:, 0].tolist()
    assert len(places) < 40
    torch.testing.assert_close(log_probs, whole[:, places])
