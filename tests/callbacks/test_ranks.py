"""Two processes on a CPU: what is gathered, and that rank zero alone writes."""

import json

import pytest

from etpo.callbacks.best_action import BestAction
from etpo.callbacks.episodes import EpisodeLog
from etpo.callbacks.metrics_csv import MetricsCSV
from etpo.callbacks.progress import RolloutProgress
from etpo.callbacks.ranks import gather
from etpo.callbacks.summary import RunSummary


class RankZeroSummary(RunSummary):
    """Leaves its numbers in a file: forked processes do not share them with the test."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            self.file.write_text(json.dumps(self.numbers))


def test_without_other_processes_there_is_one_value():
    assert gather({"a": 1}) == [{"a": 1}]


@pytest.mark.slow
def test_two_ranks(tmp_path, fit, sampled):
    summary = RankZeroSummary(tmp_path / "numbers.json")
    files = [EpisodeLog(tmp_path), BestAction(tmp_path), MetricsCSV(tmp_path)]
    fit([RolloutProgress(), summary, *files], 2, devices=2, strategy="ddp_fork")
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert lines == [
        {"iteration": i, **record._asdict(), "rank": rank}
        for i in range(2)
        for rank in range(2)
        for record in sampled(i, rank)
    ]
    # rank 1 is paid 1/8 more for a success
    assert (tmp_path / "best_action.txt").read_text() == "a1.1.1"
    numbers = json.loads(summary.file.read_text())
    assert numbers["env_steps"] == 16
    assert numbers["action_tokens"] == 80
    assert numbers["best_reward"] == 0.875
    # iteration 1: (0.5 + 0.75 - 1 + 0.5) / 4 on rank 0, three times 1/8 more on rank 1
    assert numbers["last_mean_reward"] == 0.1875 + 3 / 64
    assert numbers["tokens_per_second"] == 20.0
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
