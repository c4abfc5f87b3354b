"""The check of the first rollout: passes rounding, finds other policies."""

import functools

import pytest
import torch
from lightning import Callback

from etpo.errors import ConfigError
from etpo.models.critics import HeadCritic
from etpo.models.prefix_tree import prefix_tree
from etpo.rollout import types

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def one_iteration(make_policy, build_algorithm, letter_env, fit):
    """one_iteration(...): a run whose learning rate is 0; `broken` changes its policy before."""

    def run(
        family="llama", algorithm="ppo_kl", precision="32-true", chunk=4096, broken=None, **model
    ):
        policy, settings = make_policy(family, **model), {"logits_chunk_size": chunk}
        module = build_algorithm(algorithm, policy, HeadCritic, policy_lr=0.0, **settings)
        if broken is not None:
            broken(module.policy)
        sizes = {"update_epochs": 1, "max_new_tokens": 12}
        return fit(module, letter_env(4), 1, trainer={"precision": precision}, **sizes)

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.2, "temperature": 0.3},
        {"lora": {**LORA, "use_dora": True}, "gradient_checkpointing": True, "min_p": 0.1},
        {"dtype": "bfloat16", "min_p": 0.1},
        {"dtype": "bfloat16", "lora": LORA, "precision": "bf16-mixed", "temperature": 2.0},
        {"precision": "bf16-mixed", "chunk": 7, "algorithm": "etpo"},
        {"family": "cohere", "algorithm": "reinforce"},
        {"family": "starcoder", "chunk": 7, "min_p": 0.3, "algorithm": "etpo"},
    ],
    ids=str,
)
def test_rounding_is_no_difference(settings, one_iteration):
    one_iteration(**settings)


def drop_a_tenth(policy):
    """Add dropout to the embeddings."""

    def drop(module, inputs, output):
        return torch.nn.functional.dropout(output, 0.1, training=True)

    policy.model.get_input_embeddings().register_forward_hook(drop)


def triple_positions(policy, monkeypatch):
    """Let a training step read other positions."""

    def wrong(*inputs):
        tree = prefix_tree(*inputs)
        return tree._replace(nodes=tree.nodes._replace(depth=3 * tree.nodes.depth))

    monkeypatch.setattr(types, "prefix_tree", wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [4096, 7])
def test_dropout_is_found(chunk, dtype, one_iteration):
    with pytest.raises(ConfigError, match=r"^model\.name_or_path: logits of llama differ"):
        one_iteration(broken=drop_a_tenth, chunk=chunk, dtype=dtype)


def test_other_positions_are_found(one_iteration, monkeypatch):
    with pytest.raises(ConfigError, match=r"^model\.name_or_path: logits of llama differ"):
        one_iteration(broken=functools.partial(triple_positions, monkeypatch=monkeypatch))


def move_the_reference(policy):
    for parameter in policy.reference_model.parameters():
        parameter.data.mul_(1.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_reference_is_found(dtype, one_iteration):
    with pytest.raises(ConfigError, match=r"^model\.lora: before the first update"):
        one_iteration(broken=move_the_reference, dtype=dtype, min_p=0.1)


def test_a_trained_policy_may_differ_from_the_reference(
    make_policy, build_algorithm, letter_env, fit
):
    """As in a resumed run."""
    module = build_algorithm("ppo_kl", make_policy(), HeadCritic)

    class Resumed(Callback):
        def on_train_start(self, trainer, pl_module):
            move_the_reference(pl_module.policy)
            steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
            steps.total.ready = steps.total.completed = 7

    fit(module, letter_env(4), 1, callbacks=[Resumed()], update_epochs=1)
    assert module.trainer.callback_metrics["rollout/kl_to_reference"].abs() > 1e-3
