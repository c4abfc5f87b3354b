"""`etpo-evaluate`: whole episodes of a checkpoint, greedy and sampled, in every environment."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from etpo import checkpoints, evaluate, train
from etpo.environments.text_env import TextVectorEnv
from etpo.errors import ConfigError, OutputError
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.rollout.types import Record


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


ROW = {"episodes", "mean_actions", "valid_rate", "mean_return", "standard_error", "interval"}
ROW |= {"success_rate", "success_interval"}


def test_greedy_and_sampled_programs_on_held_out_rows(evaluated, finished_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # narrower than the table and the program
    result, printed = evaluated()
    assert set(result) == {"ckpt_path", "environment", "greedy", "sampled", "greedy_program"}
    assert result["environment"] == "tic_tac_toe"
    assert Path(result["ckpt_path"]).parents[1] == finished_run.folder
    for name, count in (("greedy", 1), ("sampled", 6)):
        row = result[name]
        assert set(row) == ROW | {"held_out_reward"}
        assert row["episodes"] == count
        assert row["mean_actions"] == 1  # first attempts
        assert -1 <= row["held_out_reward"] <= 1
        assert row["held_out_reward"] != row["mean_return"]  # other rows
        cells = (name, str(count), f"{row['valid_rate']:.0%}", f"{row['held_out_reward']:.4f}")
        (line,) = (line for line in printed.splitlines() if f" {name} " in line)
        assert set(cells) <= set(line.replace("│", " ").split())
    summary = json.loads((finished_run.folder / "summary.json").read_text())
    greedy = summary["last_greedy_reward"]  # of the same weights, in float32
    assert result["greedy"]["mean_return"] == pytest.approx(greedy, abs=1e-6)
    assert f"\n{result['greedy_program']}\n" in printed  # to be copied: no line is broken


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
    assert paper["greedy"]["held_out_reward"] is None
    assert paper["sampled"]["held_out_reward"] is None
    assert paper["greedy_program"] == result["greedy_program"]
    assert paper["greedy"]["mean_return"] != result["greedy"]["mean_return"]  # of all rows


def test_a_checkpoint_without_its_run_is_refused_in_one_line(command, finished_run, tmp_path):
    moved = tmp_path / "checkpoints" / "last.ckpt"
    moved.parent.mkdir()
    moved.write_bytes((finished_run.folder / "checkpoints" / "last.ckpt").read_bytes())
    for path in ("none.ckpt", moved):
        ended = command(evaluate.main, f"ckpt_path={path}", f"hydra.run.dir={tmp_path / 'out'}")
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith(f"error: ckpt_path={path}: ")
        assert ended.err.count("\n") == 1


def test_a_refused_evaluation_leaves_no_folder(command, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = finished_run.folder / "checkpoints" / "last.ckpt"
    for arguments in (("ckpt_path=none.ckpt",), (f"ckpt_path={last}", "samples=0")):
        assert command(evaluate.main, *arguments).status == 2
        assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_cannot_be_read_is_refused(finished_run, tmp_path):
    moved = shutil.copytree(finished_run.folder, tmp_path / "run")
    for content in (b"a: [", b"\xff\xff"):
        (moved / ".hydra" / "config.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=f"^ckpt_path={moved}: "):
            checkpoints.saved_config(str(moved), [])


def test_the_run_folder_of_every_form_of_a_checkpoints_path(finished_run, tmp_path, monkeypatch):
    folder = finished_run.folder
    link = tmp_path / "deep" / "down" / "kept.ckpt"
    link.parent.mkdir(parents=True)
    link.symlink_to(folder / "checkpoints" / "best.ckpt")
    monkeypatch.setenv("HOME", str(folder.parent))
    forms = ("", "/checkpoints", "/checkpoints/last.ckpt")
    for path in [*(f"{start}{f}" for start in (folder, f"~/{folder.name}") for f in forms), link]:
        run = checkpoints.saved_config(str(path), [])
        assert Path(run.paths.output_dir) == folder


class Countdown(TextVectorEnv):
    """An episode from seed s lasts s % 4 + 1 actions and pays 1 at its end; then a longer one."""

    task_name = "countdown"

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.asked: list[int] = []

    def reset(self, *, seed=None, options=None):
        assert options == {"evaluation": True}
        self.left = [(seed + i) % 4 + 1 for i in range(self.num_envs)]
        return [self.seen(env) for env in range(self.num_envs)], {}

    def seen(self, env):
        return {"instruction": "", "prefix": f"{self.left[env]} left", "suffix": ""}

    def told(self, envs):
        return {}

    def step_part(self, actions, envs):
        self.asked.append(len(envs))
        for env in envs:
            self.left[env] -= 1
        done = np.array([self.left[env] == 0 for env in envs])
        for env in envs[done]:
            self.left[env] = 9
        none = [None] * len(envs)
        infos = {"error": none, "cached": [False] * len(envs), "final_obs": none} | self.told(envs)
        rewards, cut = done.astype(float), np.zeros(len(envs), dtype=bool)
        return [self.seen(env) for env in envs], rewards, done, cut, infos


class Together(Countdown):
    """Can only step all copies."""

    step_part = TextVectorEnv.step_part

    def step(self, actions):
        return Countdown.step_part(self, actions, np.arange(self.num_envs))


@pytest.fixture(scope="module")
def policy(checkpoint):
    return LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())


def played(policy, environment, count, generator=None, max_actions=100):
    with torch.no_grad():
        return evaluate.play(
            policy,
            environment,
            count,
            max_new_tokens=3,
            max_actions=max_actions,
            generator=generator,
            seed=2,
        )


@pytest.mark.parametrize("kind", [Countdown, Together])
def test_every_episode_is_played_to_its_end(kind, policy):
    """Short ones are not counted twice, and nothing of a second episode is counted."""
    environment = kind(3)
    episodes = played(policy, environment, 5)
    assert [len(episode) for episode in episodes] == [3, 4, 1, 2, 3]  # of seeds 2 to 6
    assert [[r.attempt for r in episode] for episode in episodes[:2]] == [[1, 2, 3], [1, 2, 3, 4]]
    assert [sum(r.reward for r in episode) for episode in episodes] == [1] * 5
    assert [episode[0].prompt[-6] for episode in episodes] == list("34123")
    if kind is Countdown:
        assert environment.asked == [3, 2, 2, 1, 2, 2, 1]  # who has ended acts no more


@pytest.mark.parametrize("kind", [Countdown, Together])
def test_what_an_environment_sends_is_checked(kind, policy, monkeypatch):
    monkeypatch.setattr(kind, "told", lambda self, envs: {"error": [ValueError("no")] * len(envs)})
    assert {r.error for e in played(policy, kind(2), 2) for r in e} == {"no"}
    for told in ({"cached": ["perhaps"] * 2}, {"error": []}):
        monkeypatch.setattr(kind, "told", lambda self, envs, told=told: told)
        with pytest.raises(ConfigError, match="^environment countdown: "):
            played(policy, kind(2), 2)


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
def test_actions_are_of_the_environments_action_space(policy, generator):
    """The grammar's where an observation has no choices."""

    class Restricted(Countdown):
        grammar = {"regex": "[xyz]"}

        def seen(self, env):
            choices = {"choices": ("u", "vw")} if self.left[env] % 2 else {}
            return super().seen(env) | choices

    for episode in played(policy, Restricted(3), 5, generator):
        for record in episode:
            even = int(record.prompt[-6]) % 2 == 0
            assert record.action in (("x", "y", "z") if even else ("u", "vw"))


def test_a_reward_that_is_no_number_is_refused(policy):
    class NoNumber(Countdown):
        def step_part(self, actions, envs):
            following, rewards, *rest = super().step_part(actions, envs)
            return following, rewards * np.nan, *rest

    with pytest.raises(ConfigError, match="^environment countdown: reward="):
        played(policy, NoNumber(2), 2)


def test_a_result_that_cannot_be_written_is_one_line(tmp_path):
    row = evaluate.statistics([records(1)], has_success=True)
    result = {"ckpt_path": "a", "environment": "b", "greedy": row, "sampled": row}
    played = {"greedy": [records(1)], "sampled": [records(1)]}
    for name in ("evaluation.json", "episodes.jsonl"):
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)  # a folder is in the file's place
        with pytest.raises(OutputError, match=name):
            evaluate.report(result, played, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        evaluate.report(result, played, tmp_path / "file")


def test_a_long_episode_is_cut(policy):
    assert [len(episode) for episode in played(policy, Countdown(2), 3, max_actions=2)] == [
        2,
        2,
        1,
    ]


def test_sampled_episodes_depend_on_the_generator(policy):
    texts = [
        [r.action for e in played(policy, Countdown(2), 3, generator) for r in e]
        for generator in (None, *(torch.Generator().manual_seed(seed) for seed in (0, 0, 1)))
    ]
    assert texts[1] == texts[2]
    assert texts[1] != texts[0]
    assert texts[1] != texts[3]


def records(*rewards: float, error: str | None = None) -> list[Record]:
    return [Record(0, i + 1, "", "", reward, error, False) for i, reward in enumerate(rewards)]


def test_statistics_by_hand():
    """Returns 1, 0, 1, 0: standard deviation 1/sqrt(3), t(3; 0.975) = 3.18245."""
    found = evaluate.statistics(
        [records(0, 1), records(0), records(1), records(0, 0, error="no")], has_success=True
    )
    assert found["episodes"] == 4
    assert found["mean_actions"] == 1.5
    assert found["valid_rate"] == pytest.approx(4 / 6)
    assert found["mean_return"] == 0.5
    assert found["standard_error"] == pytest.approx(1 / 12**0.5)
    assert found["interval"] == pytest.approx([0.5 - 0.918694, 0.5 + 0.918694], abs=1e-5)
    assert found["success_rate"] == 0.5
    # (p + z^2 / 2n -+ z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.959964
    assert found["success_interval"] == pytest.approx([0.150036, 0.849964], abs=1e-5)


def test_statistics_that_are_not_defined():
    found = evaluate.statistics([records(0.25)], has_success=False)
    assert found["mean_return"] == 0.25
    assert found["standard_error"] is found["interval"] is found["success_rate"] is None


RUNS = {
    "gymnasium": (
        "environment=gymnasium",
        "environment.id=etpo_tasks.sokoban:etpo/Sokoban-v0",
        "environment.max_episode_steps=2",
        "model.lora={r:2,target_modules:[q_proj],task_type:CAUSAL_LM}",
    ),
    "sokoban": (
        "environment=sokoban",
        "algorithm=zero_shot",
        "environment.max_episode_steps=2",
    ),
    "token_mdp": ("environment=token_mdp", "model=token_mdp", "algorithm=zero_shot"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_any_environment_is_evaluated(name, command, checkpoint, tmp_path):
    """The command that the run prints at its end, as it is printed."""
    model = () if name == "token_mdp" else ("model=causal_lm", "model.gradient_checkpointing=false")
    if model:
        model += (f"model.name_or_path={checkpoint('llama')}",)
    sizes = ("rollout.num_envs=2", "rollout.actions_per_iteration=4", "rollout.minibatch_size=4")
    sizes += ("rollout.update_epochs=1", "rollout.max_new_tokens=6", "trainer.max_epochs=1")
    run = tmp_path / "run"
    ended = command(train.main, *RUNS[name], *model, *sizes, f"hydra.run.dir={run}")
    assert ended.status == 0, ended.err
    (printed,) = (line for line in ended.out.splitlines() if "etpo-evaluate" in line)
    best = printed.partition("etpo-evaluate ")[2].replace("last.ckpt", "best.ckpt")
    assert Path(best.partition("=")[2]).is_file()
    out = tmp_path / "out"
    ended = command(evaluate.main, best, "samples=3", f"hydra.run.dir={out}")
    assert ended.status == 0, ended.err
    result = json.loads((out / "evaluation.json").read_text())
    actions = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    for policy in ("greedy", "sampled"):
        assert set(result[policy]) == ROW
        own = [action for action in actions if action["policy"] == policy]
        assert {action["episode"] for action in own} == {0, 1, 2}
        returns = [sum(a["reward"] for a in own if a["episode"] == e) for e in range(3)]
        assert result[policy]["mean_return"] == pytest.approx(np.mean(returns))
        assert result[policy]["mean_actions"] == len(own) / 3
    if name != "token_mdp":
        assert len(actions) == 12  # two steps an episode
        assert result["sampled"]["success_rate"] == 0.0
        starts = [a["prompt"] for a in actions if a["attempt"] == 1]
        assert starts[:3] == starts[3:]  # both policies in the same houses
        assert len(set(starts)) == 3
