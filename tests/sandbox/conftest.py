"""A small task that every program here is run on."""

from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from etpo_sandbox import Sandbox, Split

N_TRAIN, N_TEST, N_FEATURES = 113, 97, 5
GOOD_PROGRAM = """
from sklearn.linear_model import LogisticRegression

def build_model(x_train, y_train):
    return LogisticRegression().fit(x_train, y_train)
"""


def make_splits(n_classes: int = 2, n_splits: int = 2) -> tuple[list[Split], list[np.ndarray]]:
    """Splits whose class is the largest of the first `n_classes` features, and their labels."""
    random = np.random.RandomState(7)
    splits, labels = [], []
    for _ in range(n_splits):
        x = random.normal(size=(N_TRAIN + N_TEST, N_FEATURES))
        y = x[:, :n_classes].argmax(axis=1)
        splits.append(Split(x[:N_TRAIN], y[:N_TRAIN], x[N_TRAIN:]))
        labels.append(y[N_TRAIN:])
    return splits, labels


def assert_scores_well(sandbox: Sandbox) -> None:
    """The sandbox still runs a good program to a good score."""
    splits, labels = make_splits(n_splits=1)
    (outcome,) = sandbox.run([GOOD_PROGRAM], splits, 2, seed=0)
    assert outcome.error is None
    for y, probabilities in zip(labels, outcome.probabilities, strict=True):
        assert roc_auc_score(y, probabilities[:, 1]) > 0.95


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """One worker, and a secret in the environment that started it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "secret-in-the-environment")
        with Sandbox(workers=1, deadline=5, memory_mib=1024) as started:
            yield started


@pytest.fixture(scope="session")
def hasty_sandbox() -> Iterator[Sandbox]:
    """A short deadline, for programs that never end."""
    with Sandbox(workers=1, deadline=0.5, memory_mib=1024) as started:
        yield started
