import json
import math
import shlex

import pytest
import torch

from etpo.callbacks.summary import RunSummary, peak_memory_mib, print_closing, write_summary
from etpo.overrides import parse


def counted(summary):
    """The part that clocks and memory do not enter."""
    clocks = ("wall_seconds", "peak_memory_mib")
    return {key: value for key, value in summary.items() if key not in clocks}


# three iterations of 4 actions of 5 tokens; 2 s of generation each
THREE = {
    "iterations": 3,
    "env_steps": 12,
    "action_tokens": 60,
    "cache_hits": 3,
    "first_mean_reward": -0.3125,
    "last_mean_reward": 0.5,
    "last_greedy_reward": 0.5,
    "best_reward": 0.75,
    "valid_rate_first": 0.5,
    "valid_rate_last": 1.0,
    "kl_to_reference_last": 0.125,
    "tokens_per_second": 10.0,
}


def test_a_run_is_counted(fit):
    collected = RunSummary()
    trainer = fit([collected], 3)
    assert counted(collected.numbers) == THREE
    assert collected.numbers["wall_seconds"] > 0
    assert float(trainer.callback_metrics["time/iteration_seconds"]) > 0


def test_a_resumed_run_counts_the_iterations_before_it(tmp_path, fit, interrupted, checkpoint):
    collected = RunSummary()
    fit([collected, checkpoint()], 3, module=interrupted(2))
    assert collected.numbers["iterations"] == 2
    resumed = RunSummary()
    fit([resumed, checkpoint()], 3, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert counted(resumed.numbers) == THREE
    assert resumed.numbers["wall_seconds"] > collected.numbers["wall_seconds"]


def test_the_best_reward_so_far_never_falls_and_survives_a_resume(fit):
    first = RunSummary()
    trainer = fit([first], 2)
    assert float(trainer.callback_metrics["rollout/best_reward_so_far"]) == 0.75
    resumed = RunSummary()
    resumed.load_state_dict(first.state_dict())
    trainer = fit([resumed], 1)  # iteration 0 pays 0.5 at most
    assert float(trainer.callback_metrics["rollout/best_reward_so_far"]) == 0.75


def test_the_summary_is_written_whole(tmp_path, fit):
    collected = RunSummary()
    fit([collected], 3)
    summary = {"status": "finished", "nan": math.nan, "held_out_auc": 0.875, **collected.numbers}
    write_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert THREE.items() <= summary.items()
    assert summary["nan"] is None
    assert summary["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_run_without_a_completed_iteration_has_a_summary(tmp_path, fit, interrupted, capsys):
    collected = RunSummary()
    fit([collected], 3, module=interrupted(0))
    summary = {"status": "interrupted", **collected.numbers}
    assert summary["iterations"] == 0
    assert summary["last_mean_reward"] is None
    assert summary["tokens_per_second"] is None
    print_closing(summary, tmp_path)
    out = capsys.readouterr().out
    assert "Interrupted after 0 iterations" in out
    assert "reward" not in out
    assert "ckpt_path" not in out


def closing(folder, status):
    summary = RunSummary().numbers | THREE
    print_closing(summary | {"status": status, "held_out_auc": None}, folder)


def test_the_closing_says_how_it_went_and_how_to_go_on(tmp_path, capsys):
    # longer than a line of 80 columns, with a space, and not to be read as markup
    folder = tmp_path / "a run [bold]" / ("x" * 80)
    (folder / "checkpoints").mkdir(parents=True)
    last = folder / "checkpoints" / "last.ckpt"
    last.touch()
    (folder / "metrics.csv").touch()
    closing(folder, "finished")
    lines = capsys.readouterr().out.splitlines()
    assert any("-0.312 -> 0.500" in line for line in lines)
    assert any(line.endswith(str(folder / "metrics.csv")) for line in lines)
    for command, rest in (("etpo-train", ["trainer.max_epochs=6"]), ("etpo-evaluate", [])):
        (line,) = (line for line in lines if command in line)
        word, checkpoint, *others = shlex.split(line[line.index(command) :])
        assert (word, others) == (command, rest)
        assert parse(checkpoint).value() == str(last)
    assert not any("learning_curve.png" in line or "held-out" in line for line in lines)
    closing(folder, "interrupted")
    assert "max_epochs" not in capsys.readouterr().out


def test_peak_memory_grows_with_what_is_allocated():
    before = peak_memory_mib(torch.device("cpu"))
    block = torch.ones(int(before) * 2**18 + 2**26)  # 4 bytes each: before + 256 MiB
    assert peak_memory_mib(torch.device("cpu")) == pytest.approx(block.nbytes / 2**20, rel=1.0)
    assert peak_memory_mib(torch.device("cpu")) > before + 200
