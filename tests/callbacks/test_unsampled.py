import csv

import pytest
import torch

from etpo import train
from etpo.callbacks.unsampled import unsampled_tokens


def test_tokens_that_no_row_takes_at_an_equal_prefix():
    """Rows 0 and 1 share their first prefix and, both taking 2, their second; row 2 shares none."""
    prompts = torch.tensor([[7, 8], [7, 8], [7, 9]])
    actions = torch.tensor([[2, 0], [2, 1], [1, 1]])
    log_pi = torch.zeros(3, 2, 4)
    log_pi[..., 3] = float("-inf")  # has no probability
    unsampled = unsampled_tokens(prompts, actions, log_pi)
    assert [[row.nonzero().flatten().tolist() for row in part] for part in unsampled] == [
        [[0, 1], [2]],
        [[0, 1], [2]],
        [[0, 2], [0, 2]],
    ]


@pytest.mark.parametrize(
    ("experiment", "chunk"),
    [("stability_base", "null"), ("stability_base", 64), ("stability_all", "null")],
)
def test_a_run_logs_what_the_critic_says_of_them(command, small_run, tmp_path, experiment, chunk):
    sizes = [o for o in small_run if not o.startswith(("trainer", "algorithm"))]
    sizes.append(f"algorithm.vocabulary_chunk={chunk}")
    overrides = (*sizes, f"experiment={experiment}", "trainer.max_epochs=2")
    ended = command(train.main, *overrides, f"hydra.run.dir={tmp_path}")
    assert ended.status == 0, ended.err
    with (tmp_path / "metrics.csv").open(newline="") as lines:
        first, second = csv.DictReader(lines)
    # a fresh critic says nothing
    assert float(first["critic/unsampled_advantage"]) == pytest.approx(0, abs=1e-6)
    promise, used = (float(second[f"critic/unsampled_advantage{end}"]) for end in ("", "_used"))
    assert abs(promise) > 1e-4
    # the default's pessimism keeps what is promised out of the objective
    assert used == pytest.approx(promise) if experiment == "stability_base" else used <= 0
    for row in (first, second):
        before, after = (float(row[f"policy/unsampled_{end}"]) for end in ("before", "after"))
        assert 0 < before < 1
        assert 0 < after < 1
        assert before != after
