"""The whole training path (Trainer, data module, ETPO, a transformer) against the exact optimum."""

import csv
import json

import pytest

from etpo import train

SMALL = (
    "environment=token_mdp",
    "model=token_mdp",
    "trainer.max_epochs=2",
    "environment.time_limit=3",
    "rollout.update_epochs=1",
)


@pytest.fixture
def run(command, tmp_path):
    """run(name, *overrides): the folder of a run of `etpo-train`."""

    def call(name, *overrides):
        ended = command(train.main, *overrides, f"hydra.run.dir={tmp_path / name}")
        assert ended.status == 0, ended.err
        return tmp_path / name

    return call


def test_a_token_mdp_is_an_ordinary_environment(run, assert_same_run):
    folder = run("first", *SMALL)
    summary = json.loads((folder / "summary.json").read_text())
    episodes = [json.loads(line) for line in (folder / "episodes.jsonl").open()]
    assert summary["environment"] == "token_mdp"
    assert summary["env_steps"] == len(episodes) == 128
    assert all(line["error"] is None for line in episodes)
    assert {line["attempt"] for line in episodes} == {1, 2, 3}
    assert {line["prompt"] for line in episodes} <= {"</s>aa", "</s>ab", "</s>ac", "</s>ba"}
    best = max(episodes, key=lambda line: line["reward"])
    assert (folder / "best_action.txt").read_text() == best["action"]
    assert not (folder / "best_action.py").exists()
    assert_same_run(folder, run("again", *SMALL))
