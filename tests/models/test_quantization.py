"""QLoRA: what is passed and refused, and with bitsandbytes the whole way on a CPU.

bitsandbytes rounds to bfloat16 on a CPU that has instructions for it; here it must not.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from etpo import export, train
from etpo.errors import ConfigError
from etpo.models import quantization
from etpo.models.critics import HeadCritic, LanguageModelCritic, LoraCritic, TrunkCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

LORA = {"r": 2, "target_modules": "all-linear"}
IDS = torch.arange(5, 25)[None]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="pip install 'etpo[quantization]'"
)


@pytest.fixture
def on_cpu(monkeypatch):
    """The CPU in place of the GPU."""
    monkeypatch.setattr(quantization, "gpu", lambda: "cpu")
    import bitsandbytes.nn.modules

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


def policy_of(folder, **settings):
    settings = {"lora": LORA, "quantization": "nf4"} | settings
    return LanguageModelPolicy(str(folder), CompletionTemplate(), **settings)


@pytest.mark.parametrize(
    ("changes", "present", "words"),
    [
        ({"quantization": "nf5"}, True, "model.quantization=nf5: allowed are null, nf4"),
        ({"quantization": True}, True, "model.quantization=True: allowed are null, nf4"),
        ({"lora": None}, True, "model.quantization=nf4: allowed with model.lora=null is null"),
        ({}, False, "model.quantization=nf4: allowed is null, .*pip install 'etpo"),
        ({}, True, "model.quantization=nf4: allowed without a CUDA GPU is null"),
    ],
)
def test_what_cannot_run_is_refused(checkpoint, monkeypatch, changes, present, words):
    monkeypatch.setattr(quantization, "find_spec", lambda name: present or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"^{words}"):
        policy_of(checkpoint("llama"), **changes)


def test_a_gguf_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model.quantization=nf4: .*GGUF"):
        policy_of(tmp_path / "model.gguf")


def test_a_run_on_the_cpu_is_refused_before_anything_is_loaded(command, checkpoint):
    name = f"model.name_or_path={checkpoint('llama')}"
    ended = command(train.main, "model=chat_lm", name, "model.quantization=nf4")
    assert ended.status == 2
    assert ended.err.startswith("error: model.quantization=nf4: allowed with trainer.accelerator")


def test_weights_are_loaded_by_each_process_on_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    settings = quantization.quantization_settings("nf4", "bfloat16")
    assert settings["device_map"] == {"": "cuda:3"}
    config = settings["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert (config.bnb_4bit_use_double_quant, config.bnb_4bit_compute_dtype) == (
        True,
        torch.bfloat16,
    )


@needs_bitsandbytes
def test_the_reference_is_the_quantised_model_and_gradients_reach_the_adapter(checkpoint, on_cpu):
    policy = policy_of(checkpoint("llama"))
    kinds = {type(m).__name__ for m in policy.model.modules()}
    assert "Linear4bit" in kinds
    quantised = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), **quantization.quantization_settings("nf4", "float32")
    )
    inputs = IDS[:, :10], torch.ones_like(IDS[:, :10]), IDS[:, 10:]
    expected = quantised(IDS).logits[:, 9:-1, : policy.vocabulary_size]
    for reference in (True, False):
        hidden = policy.hidden_states(*inputs, reference=reference)
        near = {"rtol": 0, "atol": 1e-4}
        torch.testing.assert_close(policy.logits(hidden, reference=reference), expected, **near)
    policy.logits(hidden).sum().backward()
    trained = policy.trainable_parameters()
    assert all(p.grad is not None and p.is_floating_point() for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)


@needs_bitsandbytes
def test_critics_that_copy_the_weights_are_refused(checkpoint, on_cpu):
    policy = policy_of(checkpoint("llama"))
    for critic, name in ((TrunkCritic, "full"), (LanguageModelCritic, "lm_copy")):
        with pytest.raises(ConfigError, match=f"critic={name}: .*allowed .* lora, frozen_trunk"):
            critic(policy)
    HeadCritic(policy)
    assert LoraCritic(policy, lora=LORA).trunk is not None


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("critic", ["lora", "frozen_trunk"])
def test_a_run_is_resumed_and_exported(critic, checkpoint, on_cpu, command, tmp_path):
    model = (f"model.name_or_path={checkpoint('llama')}", "model/prompt=completion")
    budget = ("rollout.num_envs=2", "rollout.actions_per_iteration=2", "rollout.max_new_tokens=4")
    budget += ("rollout.minibatch_size=2", "rollout.update_epochs=1", "environment.dataset=iris")
    budget += ("environment.n_splits=1", "trainer.max_epochs=1", "trainer.accelerator=auto")
    run = ("model=chat_lm", "model.quantization=nf4", f"critic={critic}", *model, *budget)
    ended = command(train.main, *run, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.status == 0, ended.err
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    names = torch.load(last)["state_dict"]
    assert not any("absmax" in name or "quant" in name for name in names)
    ended = command(train.main, f"ckpt_path={last}", "trainer.max_epochs=2")
    assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 2
    with torch.no_grad():
        expected = export.load_policy(str(last)).model(IDS).logits
    for merge, kind in (("true", AutoModelForCausalLM), ("false", AutoPeftModelForCausalLM)):
        out = tmp_path / merge
        ended = command(export.main, f"ckpt_path={last}", f"out={out}", f"merge={merge}")
        assert ended.status == 0, ended.err
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        settings = {} if merge == "true" else {"quantization_config": config}
        with torch.no_grad():
            again = kind.from_pretrained(out, **settings)(IDS).logits
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)
