"""Two processes take the step of one process with the joined batch, with every strategy."""

import functools
import importlib.util
import os
import socket

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.multiprocessing import start_processes

from etpo.algorithms.etpo import ETPO
from etpo.algorithms.ppo import PPO
from etpo.config import CONF
from etpo.errors import ConfigError, error_line
from etpo.models.critics import HeadCritic, LoraCritic, TrunkCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.rollout import datamodule
from etpo.rollout.collector import collect
from etpo.rollout.datamodule import RolloutDataModule
from etpo.rollout.types import Actions, Rollout, pad_stack
from etpo.sharding import ShardedStrategy

from ..by_token import decisions_of

ENVS, ROUNDS, TOKENS = 2, 4, 5
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
LORA_CRITIC = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
ADAPTED = functools.partial(LoraCritic, lora=LORA_CRITIC)
SHARED = {
    "beta": 0.1,
    "beta_final_factor": 1.0,
    "beta_anneal_iters": 1,
    "gamma": 0.9,
    "truncation_kl_coef": 0.0,
    "max_kl": None,
    "policy_lr": 0.5,
    "critic_lr": 0.5,
    "max_grad_norm": 0.01,  # limits both groups
}
OWN = {
    ETPO: {
        "lambda_": 0.9,
        "lambda_anneal_iters": None,
        "eta": 0.05,
        "pessimism_threshold": 0.5,
        "doubly_robust": True,
        "normalize_by_advantage_rms": True,
        "clip": 0.2,
        "tau": 0.5,
        "critic_loss": "huber",
        "huber_delta": 1.0,
    },
    PPO: {"unit": "action", "lambda_": 0.5},
}


def build(algorithm, folder, lora=None, critic=HeadCritic, dtype="float32", **changes):
    torch.manual_seed(0)
    return algorithm.from_config(
        lambda: LanguageModelPolicy(str(folder), CompletionTemplate(), lora=lora, dtype=dtype),
        functools.partial(critic, hidden_size=8),
        functools.partial(torch.optim.SGD, momentum=0.9),
        **(SHARED | OWN[algorithm] | changes),
    )


def rollout_of(module, env, rank):
    """The rollout of process `rank`, with random rewards; rank 1 has longer actions."""
    generator = torch.Generator().manual_seed(rank)
    rollout = collect(module.policy, env, ROUNDS, TOKENS + 3 * rank, generator, seed=rank)
    rewards = torch.rand(len(rollout.actions.rewards), generator=generator) + rank
    return rollout._replace(actions=rollout.actions._replace(rewards=rewards))


def joined(module, one, other):
    """The rollout of a process that has the environments of both."""

    def rows(first, second):
        pair = [f.unflatten(0, (ROUNDS, ENVS)) for f in (first, second)]
        return torch.cat(pair, dim=1).flatten(0, 1)

    pad = module.policy.pad_id
    fills = {"prompt_ids": (pad, True), "prompt_mask": (False, True), "action_ids": (pad, False)}
    fields = {}
    for name, first in one.actions._asdict().items():
        second = getattr(other.actions, name)
        if first.ndim > 1:
            value, left = fills.get(name, (0, False))
            both = pad_stack([first, second], value, left=left)
            first, second = both.split([len(first), len(second)])
        fields[name] = rows(first, second)
    cut = rows(*(torch.arange(len(r.actions.step)) + 100 * i for i, r in enumerate((one, other))))
    prompts = [
        ids[mask]
        for r in (one, other)
        for ids, mask in zip(r.bootstrap.prompt_ids, r.bootstrap.prompt_mask, strict=True)
    ]
    starts = [
        i + 100 * n
        for n, r in enumerate((one, other))
        for i in r.actions.truncated.nonzero()[:, 0].tolist()
    ]
    order = [starts.index(i) for i in cut.tolist() if i in starts]
    ids = pad_stack([prompts[i][None] for i in order], pad, left=True)
    mask = pad_stack(
        [torch.ones(1, len(prompts[i]), dtype=torch.bool) for i in order], False, left=True
    )
    records = [*one.records, *other.records]
    following = decisions_of(ids, mask)
    return Rollout(Actions(**fields), following, records, 2 * ENVS, 0, 1.0, 1.0)


def fitted(module, env, rollouts, minibatch, tmp_path, ckpt_path=None, **options):
    """Train one iteration, or `max_epochs`, on `rollouts[rank]` and return the trainer."""
    data = RolloutDataModule(
        env,
        actions_per_iteration=2 * ENVS * ROUNDS,
        minibatch_size=minibatch,
        update_epochs=1,
        max_new_tokens=TOKENS,
        num_envs=env.num_envs,
        seed=0,
    )
    trainer = Trainer(
        **({"accelerator": "cpu", "devices": 1, "plugins": None, "max_epochs": 1} | options),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    datamodule.collect = lambda *args, **kwargs: rollouts[trainer.global_rank]
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    finally:
        datamodule.collect = collect
    return trainer


def process(rank, port, strategy, work):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    work(devices=2, strategy=strategy())


def in_two_processes(strategy, work):
    """Run `work(devices=2, strategy=...)` in two processes, one per rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(process, (port, strategy, work), nprocs=2, start_method="fork")


def ddp():
    return "ddp_find_unused_parameters_true"


UNLIMITED = {"max_grad_norm": 1e9, "policy_lr": 1e-3}  # else a factor of the loss does not show
CASES = [
    (ddp, ETPO, "llama", None, HeadCritic, {}),
    (ddp, ETPO, "llama", None, HeadCritic, UNLIMITED),
    (ddp, ETPO, "llama", LORA, HeadCritic, UNLIMITED),
    (ddp, PPO, "llama", None, HeadCritic, UNLIMITED),
    (ddp, PPO, "llama", LORA, HeadCritic, UNLIMITED),
    (ShardedStrategy, ETPO, "llama", None, TrunkCritic, {}),
    (ShardedStrategy, ETPO, "llama", LORA, HeadCritic, {}),
    (ShardedStrategy, ETPO, "llama", LORA, ADAPTED, {}),  # policy and critic share weights
    (ShardedStrategy, PPO, "llama", None, HeadCritic, {}),
    (ShardedStrategy, PPO, "llama", LORA, HeadCritic, {}),
    (ShardedStrategy, ETPO, "starcoder", None, HeadCritic, {}),  # its embeddings are tied
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "algorithm", "family", "lora", "critic", "changes"), CASES)
def test_two_processes_take_the_step_of_one(
    strategy, algorithm, family, lora, critic, changes, checkpoint, letter_env, tmp_path
):
    make = functools.partial(build, algorithm, checkpoint(family), lora, critic, **changes)
    probe = make()
    before = {name: p.detach().clone() for name, p in probe.named_parameters()}
    rollouts = [rollout_of(probe, letter_env(ENVS), rank) for rank in (0, 1)]
    assert rollouts[0].actions.action_mask.sum() != rollouts[1].actions.action_mask.sum()
    one = fitted(
        probe, letter_env(2 * ENVS), [joined(probe, *rollouts)], 2 * ENVS * ROUNDS, tmp_path
    )
    one.save_checkpoint(tmp_path / "one.ckpt")
    expected = one.strategy.lightning_module_state_dict()

    def work(**options):
        trainer = fitted(make(), letter_env(ENVS), rollouts, ENVS * ROUNDS, tmp_path, **options)
        trainer.save_checkpoint(tmp_path / "two.ckpt")  # all processes take part
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            torch.save(weights, tmp_path / "weights.pt")
            torch.save(trainer.callback_metrics, tmp_path / "metrics.pt")

    in_two_processes(strategy, work)
    weights = torch.load(tmp_path / "weights.pt")
    assert weights.keys() == expected.keys()
    moved = {n for n, p in before.items() if not torch.equal(p, expected[n])}
    assert any(n.startswith("policy.model") for n in moved)
    assert any(n.startswith("critic") for n in moved)
    for name in moved:  # weights would hide the difference of small steps
        step, other = expected[name] - before[name], weights[name] - before[name]
        torch.testing.assert_close(other, step, rtol=1e-4, atol=1e-7)
    assert layout_of(tmp_path / "two.ckpt") == layout_of(tmp_path / "one.ckpt")
    metrics = torch.load(tmp_path / "metrics.pt")
    for name in ("entropy", "grad_norm/policy", "grad_norm/critic", "lr/policy", "clip_fraction"):
        expected = one.callback_metrics[f"train/{name}"]
        torch.testing.assert_close(metrics[f"train/{name}"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_sharded_adapter_of_bfloat16_weights_stays_in_float32(checkpoint, letter_env, tmp_path):
    """It takes the step of one process, up to the rounding of bfloat16."""
    make = functools.partial(build, ETPO, checkpoint("llama"), LORA, dtype="bfloat16")
    probe = make()
    before = {n: p.detach().clone() for n, p in probe.named_parameters() if p.requires_grad}
    rollouts = [rollout_of(probe, letter_env(ENVS), rank) for rank in (0, 1)]
    env = letter_env(2 * ENVS)
    fitted(probe, env, [joined(probe, *rollouts)], 2 * ENVS * ROUNDS, tmp_path)

    def work(**options):
        trainer = fitted(make(), letter_env(ENVS), rollouts, ENVS * ROUNDS, tmp_path, **options)
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            torch.save(weights, tmp_path / "weights.pt")

    in_two_processes(ShardedStrategy, work)
    weights = torch.load(tmp_path / "weights.pt")
    for part in ("policy.model", "critic"):
        names = [n for n in before if n.startswith(part)]
        one = torch.cat([(probe.get_parameter(n) - before[n]).flatten() for n in names])
        two = torch.cat([(weights[n] - before[n]).flatten() for n in names])
        assert one.dtype == two.dtype == torch.float32
        assert torch.cosine_similarity(one, two, dim=0) > 0.99


@pytest.mark.slow
def test_a_sharded_run_resumes_from_its_checkpoint(checkpoint, letter_env, tmp_path):
    """With the weights, the target critic and the momentum of its last iteration."""
    make = functools.partial(build, ETPO, checkpoint("llama"), LORA)
    rollouts = [rollout_of(make(), letter_env(ENVS), rank) for rank in (0, 1)]

    def work(**options):
        saved = {}
        for name, iterations, start in (("whole", 2, None), ("half", 1, None), ("rest", 2, "half")):
            path = start and tmp_path / f"{start}.ckpt"
            budget = {"ckpt_path": path, "max_epochs": iterations}
            args = make(), letter_env(ENVS), rollouts, ENVS * ROUNDS, tmp_path
            trainer = fitted(*args, **budget, **options | {"strategy": ShardedStrategy()})
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
            saved[name] = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            torch.save(saved, tmp_path / "weights.pt")

    in_two_processes(ShardedStrategy, work)
    whole, half, rest = torch.load(tmp_path / "weights.pt").values()
    assert any(not torch.equal(weight, half[name]) for name, weight in whole.items())
    for name, weight in whole.items():
        torch.testing.assert_close(rest[name], weight, rtol=0, atol=0)


def layout_of(file):
    """Shapes of the weights, by name, and of the optimizer's moments of a checkpoint."""
    saved = torch.load(file)
    moments = saved["optimizer_states"][0]["state"]
    shapes = {name: weight.shape for name, weight in saved["state_dict"].items()}
    return shapes, sorted(state["momentum_buffer"].shape for state in moments.values())


def test_accumulated_gradients_are_those_of_the_large_minibatch(checkpoint, letter_env, tmp_path):
    results = []
    for minibatch, batches in ((2 * ENVS * ROUNDS, 1), (ENVS * ROUNDS, 2)):
        module = build(ETPO, checkpoint("llama"))
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        rollouts = [rollout_of(module, letter_env(2 * ENVS), 0)]
        env = letter_env(2 * ENVS)
        fitted(module, env, rollouts, minibatch, tmp_path, accumulate_grad_batches=batches)
        results.append({n: p.detach() - before[n] for n, p in module.named_parameters()})
    assert any(step.any() for step in results[0].values())
    for name, step in results[0].items():
        torch.testing.assert_close(results[1][name], step, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("algorithm", [ETPO, PPO])
def test_mixed_precision_trains(algorithm, checkpoint, letter_env, tmp_path):
    module = build(algorithm, checkpoint("llama"))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    rollouts = [rollout_of(module, letter_env(2 * ENVS), 0)]
    env = letter_env(2 * ENVS)
    fitted(module, env, rollouts, ENVS * ROUNDS, tmp_path, precision="bf16-mixed")
    after = dict(module.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    for part in ("policy.model", "critic"):
        assert any(not torch.equal(p, before[n]) for n, p in after.items() if n.startswith(part))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_of_another_precision_are_refused(precision, checkpoint, letter_env, tmp_path):
    module = build(ETPO, checkpoint("llama"))
    with pytest.raises(ConfigError, match=f"trainer.precision={precision}: allowed are 32-true"):
        fitted(module, letter_env(2 * ENVS), [], ENVS * ROUNDS, tmp_path, precision=precision)


def test_the_configuration_selects_the_sharded_strategies():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sharded = compose("train", ["trainer=fsdp"]).trainer.strategy
        trainer = compose("train", ["trainer=deepspeed"]).trainer
    assert trainer.precision == "32-true"
    deepspeed = trainer.strategy
    assert isinstance(instantiate(sharded), ShardedStrategy)
    if importlib.util.find_spec("deepspeed") is not None:
        assert isinstance(instantiate(deepspeed), DeepSpeedStrategy)
        return
    with pytest.raises(InstantiationException) as caught:
        instantiate(deepspeed)
    message = error_line(caught.value)
    assert message.startswith("trainer=deepspeed: needs the package deepspeed")
    assert "\n" not in message
