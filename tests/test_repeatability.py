"""A seed decides everything but the time: rewards, losses and weights, to the last bit."""

import pytest

from etpo import train


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_seed_repeats_whatever_the_number_of_workers(
    workers, command, finished_run, small_run, assert_same_run, tmp_path
):
    """`finished_run` was another process, with one worker per core."""
    overrides = (f"environment.sandbox.workers={workers}", f"hydra.run.dir={tmp_path}")
    ended = command(train.main, *small_run, *overrides)
    assert ended.status == 0, ended.err
    assert_same_run(tmp_path, finished_run.folder)


def test_another_seed_is_another_run(command, finished_run, small_run, repeatable, tmp_path):
    overrides = ("seed=1", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}")
    ended = command(train.main, *small_run, *overrides)
    assert ended.status == 0, ended.err
    (rows, episodes), (other_rows, other_episodes) = map(
        repeatable, (tmp_path, finished_run.folder)
    )
    assert rows[0] != other_rows[0]
    assert episodes.splitlines()[:16] != other_episodes.splitlines()[:16]
