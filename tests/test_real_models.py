"""The whole loop with each `conf/model`, on small random checkpoints of the models' families.

A random model writes no program that runs. What its actions are worth is therefore replaced, so
that there is something to learn; all else is the run as it is.
"""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Trainer
from omegaconf import DictConfig
from transformers import AutoModel

from etpo import evaluate, train
from etpo.config import CONF
from etpo.generation.sampler import generate
from etpo_tasks.data_science.scoring import ProgramScorer, Score

from .by_token import gather_tokens, hidden_states

FAMILY = {
    "causal_lm": "llama",
    "chat_lm": "qwen-instruct",
    "codellama-7b": "codellama",
    "deepseek-coder-1.3b": "deepseek",
    "qwen2.5-coder-0.5b": "qwen",
    "qwen2.5-coder-0.5b-instruct": "qwen-instruct",
    "qwen2.5-coder-1.5b": "qwen",
    "qwen2.5-coder-1.5b-instruct": "qwen-instruct",
    "qwen2.5-coder-7b": "qwen",
    "qwen2.5-coder-7b-instruct": "qwen-instruct",
    "starcoder2-3b": "starcoder",
    "gemma-3-270m": "gemma3",
    "llama-3.2-1b": "llama3",
    "qwen3-0.6b": "qwen3",
    "qwen3.5-0.8b": "qwen3.5",
    "smollm2-135m": "smollm2",
    "smollm3-3b": "smollm3",
}
# differ from a smaller one by the hub id, and by bfloat16, which the loop below replaces
LARGER = {
    "gemma-3-1b": "gemma-3-270m",
    "llama-3.2-3b": "llama-3.2-1b",
    "qwen3-1.7b": "qwen3-0.6b",
    "qwen3-4b": "qwen3-0.6b",
    "qwen3.5-2b": "qwen3.5-0.8b",
    "qwen3.5-4b": "qwen3.5-0.8b",
}
TINY_BUDGET = (
    "trainer.max_epochs=2",
    "rollout.num_envs=4",
    "rollout.actions_per_iteration=8",
    "rollout.minibatch_size=4",
    "rollout.update_epochs=1",
    "rollout.max_new_tokens=6",
    "algorithm.policy_lr=1e-2",
    "environment.n_splits=1",
    "environment.dataset=iris",
)


@pytest.fixture
def graded_by_length(monkeypatch):
    """Every program that is longer than its head succeeds; the reward falls with its length."""

    def score(self, programs, on_result=None):
        return [Score(1 / (1 + len(program.encode()) % 7), None, False) for program in programs]

    monkeypatch.setattr(ProgramScorer, "start", lambda self: None)
    monkeypatch.setattr(ProgramScorer, "score", score)
    monkeypatch.setattr(ProgramScorer, "held_out", lambda self, programs: score(self, programs))


def composed(folder, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"paths.output_dir={folder}", "study=none", *overrides])


def trained(folder, option: str, checkpoint, *overrides: str) -> Trainer:
    """Return the trainer of a finished run of two iterations that moved the policy."""
    overrides = (f"model={option}", "model.dtype=float32", *TINY_BUDGET, *overrides)
    if option in FAMILY:
        overrides = (f"model.name_or_path={checkpoint(FAMILY[option])}", *overrides)
    summary, trainer = train.train(composed(folder, *overrides))
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["status"], summary["iterations"]) == ("finished", 2)
    assert summary["kl_to_reference_last"] > 1e-4
    return trainer


def test_every_model_of_the_configuration_is_tested():
    # by tests/test_convergence.py, tests/test_documented_commands.py and tests/tasks
    made_here = {"tiny", "token_mdp", "game_lm", "credit_lm"}
    names = {path.stem for path in (CONF / "model").glob("*.yaml")}
    assert names == {*FAMILY, *LARGER, *made_here}


@pytest.mark.parametrize("option", LARGER)
def test_a_larger_model_differs_by_its_weights_alone(option, tmp_path):
    larger, smaller = (composed(tmp_path, f"model={n}") for n in (option, LARGER[option]))
    assert larger.model.name_or_path != smaller.model.name_or_path
    assert larger.model.dtype == "bfloat16"
    for cfg in (larger, smaller):
        cfg.model.name_or_path = cfg.model.dtype = ""
    assert larger == smaller


@pytest.mark.parametrize("option", [*FAMILY, "tiny"])
def test_the_loop_runs_and_moves_the_policy(
    option, tmp_path, checkpoint, command, graded_by_length
):
    run = trained(tmp_path, option, checkpoint)
    policy = run.lightning_module.policy
    cfg = composed(tmp_path, f"model={option}", "model.name_or_path=x")
    names = {f"policy.model.{n}" for n, p in policy.model.named_parameters() if p.requires_grad}
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    kept = {name for name in saved if name.startswith("policy.")}
    if cfg.model.lora is None:
        assert names <= kept  # a tied weight is kept under both of its names
        assert not any("reference" in name for name in kept)
    else:
        assert kept == {*names, "policy.base_sample"}
        assert all("lora_" in name for name in names)


@pytest.mark.parametrize("option", ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
def test_a_trunk_critic_learns_beside_full_weights_and_beside_lora(
    option, tmp_path, checkpoint, command, graded_by_length
):
    run = trained(tmp_path, option, checkpoint, "critic=full", "algorithm.critic_lr=1e-2")
    trunk = dict(run.lightning_module.critic.trunk.named_parameters())
    shared = {id(p) for p in run.lightning_module.policy.parameters()} & {
        id(p) for p in trunk.values()
    }
    assert not shared
    pretrained = AutoModel.from_pretrained(checkpoint(FAMILY[option])).named_parameters()
    for name, weights in pretrained:
        assert not torch.equal(trunk[name], weights), name


@pytest.mark.parametrize(
    ("critic", "option"), [("lora", "qwen2.5-coder-1.5b"), ("lm_copy", "qwen2.5-coder-0.5b")]
)
def test_a_checkpoint_holds_what_a_critic_trains(
    critic, option, tmp_path, checkpoint, command, graded_by_length
):
    run = trained(tmp_path, option, checkpoint, f"critic={critic}", "algorithm.tau=0.5")
    names = {name for name, p in run.lightning_module.critic.named_parameters() if p.requires_grad}
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    for part in ("critic.", "target_critic."):
        kept = {name.removeprefix(part) for name in saved if name.startswith(part)}
        assert kept == names
    assert any(not torch.equal(saved[f"critic.{n}"], saved[f"target_critic.{n}"]) for n in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "variant"),
    [
        ("model.dtype=bfloat16", (torch.bfloat16, "sdpa", 4)),
        ("model.attn_implementation=eager", (torch.float32, "eager", 4)),
        ("trainer.accumulate_grad_batches=2", (torch.float32, "sdpa", 2)),
    ],
)
@pytest.mark.parametrize("option", ["causal_lm", "starcoder2-3b"])
def test_variants_of_a_run(
    option, override, variant, tmp_path, checkpoint, command, graded_by_length
):
    """Weights' type, attention and optimizer steps are what the override says; it learns."""
    run = trained(tmp_path, option, checkpoint, override)
    policy = run.lightning_module.policy.model
    dtype = next(policy.parameters()).dtype
    assert (dtype, policy.config._attn_implementation, run.global_step) == variant


@pytest.mark.parametrize("option", ["codellama-7b", "qwen2.5-coder-0.5b-instruct"])
def test_what_is_sampled_is_what_is_trained(
    option, tmp_path, checkpoint, command, graded_by_length
):
    policy = trained(tmp_path, option, checkpoint).lightning_module.policy
    prompts = policy.encode(
        [
            {"instruction": "Write it.", "prefix": "def f():\n", "suffix": "\n"},
            {"instruction": "Write it, please, now.", "prefix": "def g(x, y):\n", "suffix": "\n"},
        ]
    )
    taken = generate(policy, prompts, 6, torch.Generator().manual_seed(0))
    inputs = prompts.ids, prompts.mask, taken.ids

    def log_probs(hidden, **side):
        found = policy.log_probs(hidden, taken=taken.ids[..., None], **side).log_probs
        return gather_tokens(found, taken.ids)

    recomputed = log_probs(hidden_states(policy, *inputs))
    sampled = log_probs(taken.hidden_states)
    torch.testing.assert_close(recomputed[taken.mask], sampled[taken.mask])
    reference = log_probs(hidden_states(policy, *inputs, reference=True), reference=True)
    assert (reference - recomputed)[taken.mask].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("option", "precision"), [("causal_lm", "32-true"), ("qwen2.5-coder-1.5b", "bf16-mixed")]
)
def test_a_checkpoint_is_evaluated_with_its_own_weights_and_precision(
    option, precision, tmp_path, checkpoint, command, graded_by_length, monkeypatch
):
    name = checkpoint(FAMILY[option])
    arguments = (f"model={option}", f"model.name_or_path={name}", "model.dtype=float32")
    arguments += (f"trainer.precision={precision}", f"hydra.run.dir={tmp_path / 'run'}")
    ended = command(train.main, *arguments, *TINY_BUDGET)
    assert ended.status == 0, ended.err
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    loaded, play = [], evaluate.play

    def observed(policy, *rest, **settings):
        loaded.append(policy)
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16-mixed")
        return play(policy, *rest, **settings)

    monkeypatch.setattr(evaluate, "play", observed)
    ended = command(
        evaluate.main, f"ckpt_path={file}", "samples=2", f"hydra.run.dir={tmp_path / 'evaluation'}"
    )
    assert ended.status == 0, ended.err
    saved = torch.load(file)["state_dict"]
    trainable = dict(loaded[0].model.named_parameters())
    trainable = {name: p for name, p in trainable.items() if p.requires_grad}
    assert trainable
    for name, weights in trainable.items():
        assert torch.equal(weights, saved[f"policy.model.{name}"]), name
