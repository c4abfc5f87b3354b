"""Fixtures: a sandbox, sampled programs and the embedded model."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from etpo_sandbox import Outcome, Sandbox, Split
from tiny_lm.build import CHECKPOINT
from tiny_lm.grammar import Program, sample


@pytest.fixture(scope="session")
def shipped_model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="session")
def shipped_tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="session")
def programs() -> list[Program]:
    """2000 draws from the grammar."""
    rng = random.Random(5)
    return [sample(rng) for _ in range(2000)]


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(deadline=10.0) as running:
        yield running


@pytest.fixture(scope="session")
def run_small(sandbox) -> Callable[[list[str]], list[Outcome]]:
    """Runs programs on one split of 287 training rows with 9 features and 2 classes."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 3, size=(320, 9)).astype(float)
    y = (x[:, 0] + x[:, 4] > 2).astype(int)
    split = Split(x[:287], y[:287], x[287:])
    return lambda sources: sandbox.run(sources, [split], 2, 0)
