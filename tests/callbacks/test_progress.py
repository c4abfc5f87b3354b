import io
import logging

import pytest
from rich.console import Console

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
def terminal(monkeypatch) -> io.StringIO:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda: console)
    return screen


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


def test_a_terminal_shows_the_stages_of_an_iteration(fit, terminal, shown):
    trainer = fit([RolloutProgress()], 1)
    assert shown == [("rollout", 2, 2), ("scoring", 1, 4), ("updating", 1, 2), ("updating", 2, 2)]
    assert "iterations" in terminal.getvalue()
    assert terminal.getvalue().count("iteration 1/1") == 1
    assert trainer.datamodule.on_progress is None
    assert trainer.datamodule.environment.on_score is None


@pytest.mark.parametrize("failure", ["interrupted", "crashing"])
def test_the_terminal_is_given_back_after_a_failure(fit, terminal, failure, request):
    callback = RolloutProgress()
    module = request.getfixturevalue(failure)(1)
    if failure == "crashing":
        with pytest.raises(RuntimeError, match="broken"):
            fit([callback], 3, module=module)
    else:
        assert fit([callback], 3, module=module).interrupted
    assert callback.bars is None
    hide, show = "\x1b[?25l", "\x1b[?25h"  # of the cursor
    assert terminal.getvalue().rfind(show) > terminal.getvalue().rfind(hide) >= 0
