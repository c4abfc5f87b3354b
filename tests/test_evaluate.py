"""`etpo-evaluate`: greedy and sampled programs of a checkpoint, on reward and held-out rows."""

import json
from pathlib import Path

import pytest

from etpo import evaluate


@pytest.fixture
def evaluated(command, finished_run, tmp_path):
    """evaluated(*arguments): `evaluation.json` of the finished run, and what was printed."""
    last = finished_run.folder / "checkpoints" / "last.ckpt"

    def call(*arguments: str) -> tuple[dict, str]:
        folder = tmp_path / "evaluation"
        call_arguments = (f"ckpt_path={last}", "samples=6", f"hydra.run.dir={folder}", *arguments)
        ended = command(evaluate.main, *call_arguments)
        assert ended.status == 0, ended.err
        assert str(folder / "evaluation.json") in ended.out
        return json.loads((folder / "evaluation.json").read_text()), ended.out

    return call


def test_greedy_and_sampled_programs_on_held_out_rows(evaluated, finished_run):
    result, printed = evaluated()
    assert set(result) == {"ckpt_path", "dataset", "greedy", "sampled", "greedy_program"}
    assert result["dataset"] == "tic_tac_toe"
    assert Path(result["ckpt_path"]).parents[1] == finished_run.folder
    for name, count in (("greedy", 1), ("sampled", 6)):
        row = result[name]
        assert set(row) == {"actions", "valid_rate", "mean_reward", "held_out_auc"}
        assert row["actions"] == count
        assert -1 <= row["held_out_auc"] <= 1
        assert row["held_out_auc"] != row["mean_reward"]  # other rows
        cells = (name, str(count), f"{row['valid_rate']:.0%}", f"{row['held_out_auc']:.4f}")
        (line,) = (line for line in printed.splitlines() if f" {name} " in line)
        assert set(cells) <= set(line.replace("│", " ").split())
    summary = json.loads((finished_run.folder / "summary.json").read_text())
    greedy = summary["last_greedy_reward"]  # of the same weights, in float32
    assert result["greedy"]["mean_reward"] == pytest.approx(greedy, abs=1e-6)
    assert result["greedy_program"] in printed


@pytest.mark.slow
def test_a_seed_repeats_and_overrides_change_the_run(evaluated):
    result, _ = evaluated()
    again, _ = evaluated("overrides=['environment.sandbox.workers=1']")
    assert again == result
    other, _ = evaluated("seed=1")
    assert other["greedy"] == result["greedy"]
    assert other["sampled"] != result["sampled"]
    overrides = "['environment.sandbox.workers=1','environment.protocol=paper']"
    paper, _ = evaluated(f"overrides={overrides}")
    assert paper["greedy"]["held_out_auc"] is paper["sampled"]["held_out_auc"] is None
    assert paper["greedy_program"] == result["greedy_program"]
    assert paper["greedy"]["mean_reward"] != result["greedy"]["mean_reward"]  # of all rows


def test_a_checkpoint_without_its_run_is_refused_in_one_line(command, finished_run, tmp_path):
    moved = tmp_path / "checkpoints" / "last.ckpt"
    moved.parent.mkdir()
    moved.write_bytes((finished_run.folder / "checkpoints" / "last.ckpt").read_bytes())
    for path in ("none.ckpt", moved):
        ended = command(evaluate.main, f"ckpt_path={path}", f"hydra.run.dir={tmp_path / 'out'}")
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith(f"error: ckpt_path={path}: ")
        assert ended.err.count("\n") == 1
