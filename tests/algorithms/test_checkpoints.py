"""What a checkpoint of an algorithm holds, and holds once."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from etpo.models.critics import LoraCritic, TrunkCritic

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


def stored(content):
    """Bytes of the distinct storages below a checkpoint's entry."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(content) if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.fixture
def saved(make_policy, build_algorithm, letter_env, fit, tmp_path):
    """saved(...): module and the content of best.ckpt and last.ckpt of one iteration of ETPO."""

    def run(critic, tau, lora=None):
        module = build_algorithm("etpo", make_policy("qwen", lora=lora), critic, tau=tau)
        folder = {"dirpath": tmp_path, "save_on_train_epoch_end": True}
        callbacks = [
            ModelCheckpoint(
                filename="best", monitor="val/reward", save_weights_only=True, **folder
            ),
            ModelCheckpoint(filename="last", **folder),
        ]
        fit(module, letter_env(4), 1, callbacks, update_epochs=1)
        return module, *(torch.load(tmp_path / f"{name}.ckpt") for name in ("best", "last"))

    return run


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("critic", [TrunkCritic, LoraCritic])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_nothing_is_kept_twice(tau, critic, lora, saved):
    module, best, last = saved(critic, tau, lora)
    policy = sum(p.nbytes for p in module.policy.trainable_parameters())
    sample = module.policy.base_sample.nbytes
    value = sum(p.nbytes for p in module.critic.parameters() if p.requires_grad)
    assert stored(best) == policy + sample
    assert "optimizer_states" not in best
    trained = policy + value
    moments = 2 * trained  # AdamW's; its counts of steps are a few bytes each
    assert stored(last["optimizer_states"]) == pytest.approx(moments, rel=1e-2)
    moved = sum(  # a head that starts at 0 gives the layers below no gradient in the first step
        p.nbytes
        for n, p in module.critic.named_parameters()
        if p.requires_grad and not torch.equal(p, module.target_critic.get_parameter(n))
    )
    assert (moved == 0) == (tau == 1)
    assert stored(last["state_dict"]) == trained + moved + sample
    names = {n for n, p in module.critic.named_parameters() if p.requires_grad}
    assert {f"target_critic.{n}" for n in names} <= last["state_dict"].keys()
    for name in names:
        kept = last["state_dict"][f"target_critic.{name}"]
        assert torch.equal(kept, module.target_critic.get_parameter(name))
