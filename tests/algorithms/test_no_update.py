"""Methods without weight updates through `etpo-train`, with programs scored by their length."""

import csv
import json

import pytest
import torch
from hydra import compose, initialize_config_dir

from etpo import evaluate, train
from etpo.algorithms.no_update import NoUpdate
from etpo.callbacks.metrics_csv import MetricsCSV
from etpo.callbacks.summary import RunSummary
from etpo.config import CONF
from etpo_tasks.data_science.prompts import HEADER
from etpo_tasks.data_science.scoring import ProgramScorer, Score

from .. import by_token
from ..by_token import gather_tokens

FIRST_PROMPT = f"# iris: 45 training rows, 4 features, 3 classes\n{HEADER}"
BUDGET = (
    "rollout.num_envs=4",
    "rollout.actions_per_iteration=16",
    "rollout.minibatch_size=8",
    "rollout.max_new_tokens=24",
    "environment.dataset=iris",
)


def worth(program: str) -> Score:
    """A third of the lengths fails."""
    if len(program) % 3 == 0:
        return Score(-1.0, f"ValueError: {len(program)} characters", False)
    return Score(len(program) % 64 / 64, None, False)


@pytest.fixture
def trained(command, monkeypatch, tmp_path):
    """trained(name, *overrides): the folder of an `etpo-train` run with programs worth `worth`."""

    def score(self, programs, on_result=None):
        return [worth(program) for program in programs]

    monkeypatch.setattr(ProgramScorer, "start", lambda self: None)
    monkeypatch.setattr(ProgramScorer, "score", score)
    monkeypatch.setattr(ProgramScorer, "held_out", score)

    def run(name, *overrides):
        resumed = any(o.startswith("ckpt_path=") for o in overrides)
        new = () if resumed else (*BUDGET, f"hydra.run.dir={tmp_path / name}")
        ended = command(train.main, *new, *overrides)
        assert ended.status == 0, ended.err
        assert "None" not in ended.err  # of Lightning, about what is meant to be
        return tmp_path / name

    return run


def episodes(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def column(folder, name):
    with (folder / "metrics.csv").open(newline="") as lines:
        return [float(row[name]) for row in csv.DictReader(lines)]


def test_every_zero_shot_action_answers_the_first_prompt(trained):
    folder = trained("run", "algorithm=zero_shot", "trainer.max_epochs=2")
    actions = episodes(folder)
    assert len(actions) == 32
    assert {a["prompt"] for a in actions} == {FIRST_PROMPT}
    assert {a["attempt"] for a in actions} == {1}
    assert any(a["error"] for a in actions)
    greedy = column(folder, "val/reward")
    assert greedy[0] == greedy[1]
    best = column(folder, "rollout/best_reward")
    assert column(folder, "rollout/best_reward_so_far") == [best[0], max(best)]


def test_reflexion_shows_the_error_and_remembers(trained):
    folder = trained("run", "algorithm=reflexion", "trainer.max_epochs=2")
    actions = episodes(folder)
    assert {a["prompt"] for a in actions[:4]} == {FIRST_PROMPT}
    failed = [i for i in range(12) if actions[i]["error"]]
    assert failed
    for i in failed:  # the environment's next action is 4 lines below
        end = f"# failed:\n{HEADER}{actions[i]['action'].rstrip()}\n# {actions[i]['error']}\n"
        assert actions[i + 4]["prompt"].endswith(f"{end}# repaired:\n{HEADER}")
        assert actions[i + 4]["attempt"] == actions[i]["attempt"] + 1
    # derived from the 16 lines of the first iteration, the greedy validation left out
    best = max(actions[:16], key=lambda a: a["reward"])
    errors = [a["error"] for a in reversed(actions[:16]) if a["error"]]
    head, _, header = FIRST_PROMPT.partition("def")
    prompt = head
    for error in reversed(list(dict.fromkeys(errors))[:3]):
        prompt += f"# earlier error: {error}\n"
    prompt += f"# scores {best['reward']:.3f}:\n{HEADER}{best['action'].rstrip()}\n# improved:\n"
    assert {a["prompt"] for a in actions[16:20]} == {f"{prompt}def{header}"}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(trained, repeatable):
    """The best action and the memory are restored."""
    whole = trained("whole", "algorithm=reflexion", "trainer.max_epochs=3")
    part = trained("part", "algorithm=reflexion", "trainer.max_epochs=1")
    last = part / "checkpoints" / "last.ckpt"
    assert torch.load(last)["state_dict"] == {}
    trained("part", f"ckpt_path={last}", "trainer.max_epochs=3")
    assert repeatable(part) == repeatable(whole)
    best = column(part, "rollout/best_reward")
    assert column(part, "rollout/best_reward_so_far") == [max(best[: i + 1]) for i in range(3)]
    assert column(part, "step") == [1, 3, 5]  # two minibatches, one pass


@pytest.mark.slow
def test_metrics_have_the_columns_of_a_trained_algorithm(trained):
    """The same columns, and the same first actions and KL: the policies have not moved yet."""
    reinforce = trained("reinforce", "algorithm=reinforce", "trainer.max_epochs=1")
    with (reinforce / "metrics.csv").open() as lines:
        columns = {name for name in next(csv.reader(lines)) if not name.startswith("train/")}
    for algorithm in ("zero_shot", "reflexion"):
        folder = trained(algorithm, f"algorithm={algorithm}", "trainer.max_epochs=1")
        with (folder / "metrics.csv").open() as lines:
            assert set(next(csv.reader(lines))) == columns
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["algorithm"].replace("_", "") == algorithm.replace("_", "")
        assert summary["env_steps"] == 16
        best = max(episodes(folder), key=lambda a: a["reward"])
        assert summary["held_out_auc"] == worth(HEADER + best["action"]).reward
        assert episodes(folder)[:4] == episodes(reinforce)[:4]


def test_a_checkpoint_is_evaluated_as_the_pretrained_model(trained, command, tmp_path):
    folder = trained("run", "algorithm=zero_shot", "trainer.max_epochs=1")
    arguments = ("samples=2", f"hydra.run.dir={tmp_path / 'evaluation'}")
    ended = command(evaluate.main, f"ckpt_path={folder}/checkpoints/best.ckpt", *arguments)
    assert ended.status == 0, ended.err
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert result["greedy"]["mean_return"] == pytest.approx(column(folder, "val/reward")[0])


def test_reflexion_names_the_environment_that_it_needs(command, tmp_path):
    arguments = ("algorithm=reflexion", "environment=sokoban", f"hydra.run.dir={tmp_path}")
    ended = command(train.main, *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "algorithm=reflexion" in ended.err
    assert "environment=data_science" in ended.err


@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("chunk", [4096, 7])
def test_no_weight_moves_and_the_kl_comes_from_min_p(
    chunk, min_p, make_policy, letter_env, fit, paid
):
    module = NoUpdate.from_config(make_policy(min_p=min_p), logits_chunk_size=chunk)
    before = {name: p.clone() for name, p in module.state_dict().items()}
    data = fit(module, paid(letter_env(4), len), 2)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
    actions = data.rollout.actions
    with torch.no_grad():
        log_pi, log_ref = (
            gather_tokens(
                by_token.log_probs(module.policy, *actions[:3], reference=reference),
                actions.action_ids,
            )
            for reference in (False, True)
        )
    # log(pi/pi_ref) is the same for every token in the support: the sampled KL is exact
    kl = ((log_pi - log_ref) * actions.action_mask).sum(1).mean()
    logged = module.iteration_metrics["rollout/kl_to_reference"]
    assert logged == pytest.approx(float(kl), abs=1e-4)
    assert (logged > 1e-2) == (min_p > 0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork_find_unused_parameters_true", "ddp_fork"])
def test_two_processes(strategy, make_policy, letter_env, fit, tmp_path):
    module = NoUpdate.from_config(make_policy())
    fit(
        module,
        letter_env(4),
        2,
        [RunSummary(), MetricsCSV(tmp_path)],
        trainer={"devices": 2, "strategy": strategy},
        minibatch_size=8,
        update_epochs=1,
        max_new_tokens=4,
    )
    assert column(tmp_path, "step") == [1, 3]
    best = column(tmp_path, "rollout/best_reward_so_far")
    mean_over_processes = column(tmp_path, "rollout/best_reward")
    assert best[1] >= best[0] >= mean_over_processes[0]


@pytest.mark.parametrize(
    ("overrides", "attempts", "mode", "epochs"),
    [
        (("algorithm=zero_shot",), 1, "repair", 1),
        (("algorithm=zero_shot", "environment.max_attempts=3"), 3, "repair", 1),
        (("environment.max_attempts=3", "algorithm=zero_shot"), 3, "repair", 1),
        (("algorithm=reflexion", "rollout.update_epochs=2"), 5, "remember", 2),
        (("algorithm=reflexion", "environment.mode=improve"), 5, "improve", 1),
        (("algorithm=reinforce",), 5, "repair", 10),
    ],
)
def test_explicit_overrides_win_over_those_of_the_algorithm(overrides, attempts, mode, epochs):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides))
    assert cfg.environment.max_attempts == attempts
    assert cfg.environment.mode == mode
    assert cfg.rollout.update_epochs == epochs
