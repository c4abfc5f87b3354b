"""Files of token credit across sessions; tests/algorithms/test_token_credit.py has the numbers."""

import json
from types import SimpleNamespace

import pytest
import torch

from etpo.callbacks.credit import TokenCredit, pad_actions

FOLLOWED = {
    "prompt_ids": [5, 6],
    "action_ids": [7],
    "steps": [True],
    "allowed": [[]],
    "record": {"env": 0, "reward": -1.0, "error": "TypeError: no"},
    "iteration": 0,
}


def line(iteration):
    return {
        "iteration": iteration,
        "env": 0,
        "episode": 1,
        "attempt": 1,
        "prompt": "p",
        "reward": 0.5,
        "error": None,
        "text": [f"text{iteration}"],
        "names": {},
        "probability": [1.0],
        "log_ratio": [0.0],
        "entropy": [0.0],
        "kl": [0.0],
        "alternatives": [[]],
    }


def start(callback, iteration, **changes):
    """Lightning's call when training starts at an iteration."""
    values = {"is_global_zero": True, "current_epoch": iteration, "datamodule": SimpleNamespace()}
    trainer = SimpleNamespace(**(values | changes))
    callback.on_train_start(trainer, SimpleNamespace())
    return trainer


@pytest.fixture
def callback(tmp_path):
    return TokenCredit(tmp_path, "iris, seed 0", 1, 8)


@pytest.mark.parametrize(("restored", "kept"), [(3, [0, 1, 2]), (2, [0, 1]), (0, [])])
def test_both_files_are_truncated_to_the_checkpoint(tmp_path, callback, restored, kept):
    file = tmp_path / "credit.jsonl"
    text = "".join(json.dumps(line(i)) + "\n" for i in range(3))
    file.write_text(text + '{"iteration": 3, "env')
    (tmp_path / "credit.html").write_text("text0 text1 text2")
    start(callback, restored)
    assert file.read_text() == "".join(json.dumps(line(i)) + "\n" for i in kept)
    page = tmp_path / "credit.html"
    assert page.exists() == bool(kept)
    if kept:
        shown = page.read_text()
        assert [i for i in range(3) if f"text{i}" in shown] == kept
        assert "SimpleNamespace, iris, seed 0" in shown


def test_other_ranks_leave_the_files_alone(tmp_path, callback):
    file = tmp_path / "credit.jsonl"
    file.write_text(json.dumps(line(3)) + "\n")
    trainer = start(callback, 0, is_global_zero=False)
    callback.lines = [line(0)]
    callback.on_train_epoch_end(trainer, None)
    assert file.read_text() == json.dumps(line(3)) + "\n"
    assert not (tmp_path / "credit.html").exists()


def test_the_followed_action_survives_a_checkpoint(tmp_path, callback):
    callback.followed = FOLLOWED
    file = tmp_path / "state"
    torch.save(callback.state_dict(), file)
    restored = TokenCredit(tmp_path, "iris, seed 0", 1, 8)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.followed == FOLLOWED


@pytest.mark.parametrize("order", [1, -1])
def test_an_action_of_an_iteration_without_choices_allows_every_token(order):
    other = FOLLOWED | {"action_ids": [1, 2], "steps": [True, False], "allowed": [[6], [0]]}
    rows = pad_actions([FOLLOWED, other][::order], torch.device("cpu"))
    assert rows.allowed.dtype == torch.int32
    assert rows.allowed.tolist()[::order] == [[[-1], [0]], [[6], [0]]]
    assert rows.step_mask.tolist() == [[True, False]] * 2


def test_a_fresh_run_follows_nothing_yet(callback):
    callback.load_state_dict(callback.state_dict())
    assert callback.followed is None


def test_an_iteration_that_is_not_completed_leaves_no_line(tmp_path, fit, interrupted, callback):
    module = interrupted(0)
    callback.lines = [line(0)]
    fit([callback], 1, module=module)
    assert list(tmp_path.glob("credit*")) == []
