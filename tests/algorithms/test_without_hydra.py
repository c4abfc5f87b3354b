"""The library without a configuration: parts, Trainer, fit."""

from lightning import Trainer

from etpo.algorithms.etpo import ETPO, ETPOSettings
from etpo.models.critics import TrunkCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.rollout.datamodule import RolloutDataModule


def test_etpo_trains_without_hydra(checkpoint, letter_env, tmp_path):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    module = ETPO(policy, TrunkCritic(policy), ETPOSettings(beta=0.01))
    data = RolloutDataModule(
        letter_env(4), actions_per_iteration=16, minibatch_size=8, update_epochs=2, max_new_tokens=5
    )
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer.fit(module, data)
    assert trainer.global_step == 2 * 2 * 2
    assert {"rollout/reward", "train/policy_loss", "val/reward"} <= set(trainer.callback_metrics)
    moved = {n.split(".")[0] for n, p in module.named_parameters() if not p.equal(before[n])}
    assert {"policy", "critic"} <= moved
    assert all(p.equal(before[n]) for n, p in module.named_parameters() if ".reference_model." in n)
