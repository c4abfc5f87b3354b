import logging
import signal

import pytest
from lightning import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from etpo.callbacks import progress
from etpo.callbacks.progress import RolloutProgress, iteration_line


def test_a_line_holds_the_numbers_of_an_iteration():
    metrics = {
        "rollout/reward": 0.51249,
        "rollout/valid_rate": 0.875,
        "val/reward": -1.0,
        "rollout/kl_to_reference": 0.0214,
        "time/tokens_per_second": 1234.4,
    }
    assert iteration_line(3, 25, metrics, 12.34) == (
        "iteration  3/25  reward  0.512  valid  88%  greedy -1.000  KL  0.021"
        "  tokens/s  1234  12.3 s"
    )


def test_metrics_that_an_algorithm_lacks_are_left_out():
    assert iteration_line(1, 2, {"val/reward": 0.5}, 1.0) == "iteration 1/2  greedy  0.500  1.0 s"


def test_without_a_terminal_only_lines_each_once(fit, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="etpo"):
        fit([RolloutProgress()], 2)
    printed = [line for line in capsys.readouterr().out.splitlines() if "iteration" in line]
    assert [line.split("  ")[0] for line in printed] == ["iteration 1/2", "iteration 2/2"]
    assert "reward -0.312" in printed[0]
    assert "greedy  0.750" in printed[1]
    assert [r.getMessage() for r in caplog.records if r.name == "etpo"] == printed


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Lines, in the order in which they and what else a test adds happen."""
    happened = []
    monkeypatch.setattr(progress.log, "info", lambda line: happened.append(line[:13]))
    return happened


class Rollouts(Callback):
    """Notes when the rollout of an iteration is collected."""

    def __init__(self, events):
        self.events = events

    def on_train_start(self, trainer, pl_module):
        trainer.datamodule.on_progress = lambda *_: self.events.append("rollout")


class Logs(DummyLogger):
    """Notes when an iteration's metrics are logged; is interrupted at those of `fails_at`."""

    def __init__(self, events, fails_at=None):
        super().__init__()
        self.events, self.fails_at = events, fails_at

    def log_metrics(self, metrics, step=None):
        if "rollout/reward" in metrics:
            if metrics["epoch"] == self.fails_at:
                raise KeyboardInterrupt
            self.events.append("logs")


class Writes(TorchCheckpointIO):
    """Notes when a checkpoint is written."""

    def __init__(self, events):
        self.events = events

    def save_checkpoint(self, *args, **kwargs):
        super().save_checkpoint(*args, **kwargs)
        self.events.append("checkpoint")


def test_a_line_comes_after_checkpoint_and_logs_and_before_the_next_rollout(
    fit, events, checkpoint
):
    callbacks = [RolloutProgress(), Rollouts(events), checkpoint()]
    fit(callbacks, 2, loggers=[Logs(events)], plugins=[Writes(events)])
    iteration = ["rollout", "checkpoint", "logs"]
    assert events == [*iteration, "iteration 1/2", *iteration, "iteration 2/2"]


def test_an_iteration_that_is_interrupted_before_its_end_has_no_line(fit, events, checkpoint):
    callbacks = [RolloutProgress(), checkpoint()]
    assert fit(callbacks, 3, loggers=[Logs(events, fails_at=1)]).interrupted
    assert events == ["logs", "iteration 1/3"]


def test_sigterm_at_the_end_of_an_iteration_comes_after_its_line(fit, events, checkpoint):
    class Terminate(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            signal.raise_signal(signal.SIGTERM)

    assert fit([RolloutProgress(), Terminate(), checkpoint()], 3).interrupted
    assert events == ["iteration 1/3"]


@pytest.fixture
def shown(monkeypatch) -> list:
    """What `RolloutProgress.show` was called with."""
    calls = []
    show = RolloutProgress.show

    def record(self, *args):
        calls.append(args)
        show(self, *args)

    monkeypatch.setattr(RolloutProgress, "show", record)
    return calls


def test_a_long_iteration_shows_its_stages(fit, shown, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    trainer = fit([RolloutProgress()], 1)
    assert shown == [("rollout", 2, 2), ("scoring", 1, 4), ("updating", 1, 2), ("updating", 2, 2)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("  ")] == [
        *("  rollout 2/2", "  scoring 1/4", "  updating 1/2", "  updating 2/2")
    ]
    assert trainer.datamodule.on_progress is None
    assert trainer.datamodule.environment.on_score is None
