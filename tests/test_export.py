"""`etpo-export`: the folder that it writes loads with transformers and peft, and says the same."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
)

from etpo import export, train
from etpo.config import tiny_checkpoint
from etpo.errors import ConfigError
from etpo.models import saving
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

from .by_token import distribution

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def trained(command, small_run, tmp_path):
    """trained(*overrides): the checkpoint of a short run with steps that are large."""

    def call(*overrides):
        folder = tmp_path / "run"
        arguments = (*small_run, "trainer.max_epochs=1", "algorithm.policy_lr=1e-2", *overrides)
        ended = command(train.main, *arguments, f"hydra.run.dir={folder}")
        assert ended.status == 0, ended.err
        return folder / "checkpoints" / "last.ckpt"

    return call


@pytest.fixture
def exported(command, tmp_path):
    """exported(ckpt_path, *overrides): the folder that the command wrote."""

    def call(ckpt_path, *overrides):
        out = tmp_path / f"out{len(overrides)}"
        ended = command(export.main, f"ckpt_path={ckpt_path}", f"out={out}", *overrides)
        assert ended.status == 0, ended.err
        assert ended.out == f"written: {out}\n"
        return out

    return call


def saved_policy(ckpt_path, lora=None):
    """The base model with the weights of a checkpoint, put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    if lora:
        model = get_peft_model(model, LoraConfig(**lora))
    state = torch.load(ckpt_path)["state_dict"]
    prefix = "policy.model."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model.eval()


def logits(model, tokenizer):
    ids = tokenizer("# iris\ndef build_model(x_train, y_train):\n", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=ids["input_ids"]).logits


def test_all_weights(trained, exported):
    ckpt_path = trained("model.temperature=0.7")
    out = exported(ckpt_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    base = AutoTokenizer.from_pretrained(tiny_checkpoint())
    assert tokenizer.get_vocab() == base.get_vocab()
    said = logits(AutoModelForCausalLM.from_pretrained(out), tokenizer)
    torch.testing.assert_close(said, logits(saved_policy(ckpt_path), base), rtol=0, atol=0)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    assert (said - logits(untrained, base)).abs().max() > 0.1
    sampling = GenerationConfig.from_pretrained(out)
    assert (sampling.temperature, sampling.min_p, sampling.top_k) == (0.7, 0.01, 0)
    assert sampling.do_sample
    assert sampling.eos_token_id == [base.eos_token_id]


def test_an_adapter_alone_and_merged(trained, exported):
    ckpt_path = trained(f"model.lora={json.dumps(LORA)}".replace('"', ""))
    base = AutoTokenizer.from_pretrained(tiny_checkpoint())
    expected = logits(saved_policy(ckpt_path, LORA), base)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    assert (expected - logits(untrained, base)).abs().max() > 1e-3

    merged = exported(ckpt_path)
    said = logits(AutoModelForCausalLM.from_pretrained(merged), base)
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    assert not (merged / "adapter_config.json").exists()

    adapter = exported(ckpt_path, "merge=false")
    said = logits(AutoPeftModelForCausalLM.from_pretrained(adapter), base)
    torch.testing.assert_close(said, expected, rtol=0, atol=0)
    assert not (adapter / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(adapter).get_vocab() == base.get_vocab()


def test_bad_input_is_one_line_and_loses_nothing(command, finished_run, tmp_path):
    last = finished_run.folder / "checkpoints" / "last.ckpt"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    for arguments, expected in (
        ((f"ckpt_path={last}", f"out={full}"), f"error: out={full} exists"),
        ((f"ckpt_path={last}", f"out={full / 'mine'}"), "error: out="),
        ((f"ckpt_path={last}",), "error: out=??? needs a value"),
        ((f"ckpt_path={last}", f"out={tmp_path / 'a'}", "merge=2"), "error: merge=2: allowed are"),
        ((f"ckpt_path={last}", f"out={tmp_path / 'a'}", "merge=false"), "error: merge=false needs"),
        (("ckpt_path=none.ckpt", f"out={tmp_path / 'a'}"), "error: ckpt_path=none.ckpt: no such"),
        ((f"ckpt_path={last}", f"out={full / 'mine' / 'below'}"), "error: out="),
    ):
        ended = command(export.main, *arguments)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith(expected)
        assert ended.err.count("\n") == 1
    assert (full / "mine").read_text() == "kept"
    assert not (tmp_path / "a").exists()


TARGETS = ["q_proj", "v_proj"]
TRAINED = {
    "all": None,
    "two matrices": {"target_modules": TARGETS},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "whole embedding": {"target_modules": TARGETS, "modules_to_save": ["embed_tokens"]},
    "whole output": {"target_modules": TARGETS, "modules_to_save": ["lm_head"]},
    "norms": {"target_modules": TARGETS, "modules_to_save": ["norm"]},
    "tied": {
        "target_modules": TARGETS,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "two tokens": {"target_modules": TARGETS, "trainable_token_indices": [70, 71]},
}


def moved_policy(checkpoint, folder, tied, lora):
    """A policy that training has moved, on a random model; its checkpoint lies in `folder`."""
    shutil.copytree(checkpoint("qwen-instruct"), folder)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # DoRA divides by the norm of every row
        model.get_input_embeddings().weight[config.pad_token_id].normal_()
    model.save_pretrained(folder)
    policy = LanguageModelPolicy(
        str(folder), CompletionTemplate(), lora=lora, temperature=0.5, min_p=0.1
    )
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return policy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("trained", "merge"),
    [(name, merge) for name in TRAINED for merge in (True, False) if merge or TRAINED[name]],
)
def test_the_folder_is_the_policy(trained, merge, tied, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = moved_policy(checkpoint, tmp_path / "base", tied, TRAINED[trained])
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    prompt, action = ids.split([4, 5], dim=1)
    with torch.no_grad():
        inputs = prompt, torch.ones_like(prompt).bool(), action
        expected = distribution(policy, *inputs).log_support_mass
        policy_logits = policy.model(input_ids=ids).logits
    text = [{"role": "user", "content": "Go. <|im_end|>"}]
    said = policy.tokenizer.apply_chat_template(text, tokenize=False)
    saving.save_policy(policy, tmp_path / "out", merge)
    if merge:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits, policy_logits, rtol=1e-4, atol=1e-4)
    # min_p, temperature and the ids that no token has, as `generate` applies them
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(text, tokenize=False) == said
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    outside = settings.suppress_tokens
    assert outside == list(range(len(tokenizer), model.config.vocab_size))
    logits[..., outside] = float("-inf")
    p = (logits[:, 3:-1] / settings.temperature).softmax(-1)
    kept = p >= settings.min_p * p.amax(-1, keepdim=True)
    kept.scatter_(-1, action[..., None], True)
    mass = torch.where(kept, p, 0.0).sum(-1).log()
    torch.testing.assert_close(mass, expected, rtol=1e-3, atol=1e-4)


def test_a_folder_that_is_not_the_policy_is_refused(checkpoint, tmp_path, monkeypatch):
    """As where untied weights would be tied again by whoever loads them."""
    lora = TRAINED["embedding"]
    policy = moved_policy(checkpoint, tmp_path / "base", True, lora)
    monkeypatch.setattr(saving, "merged", lambda policy: policy.merge_and_unload())
    with pytest.raises(ConfigError, match="^merge=true: log-probabilities"):
        saving.save_policy(policy, tmp_path / "out", True)


def test_a_policy_with_a_short_context(checkpoint, tmp_path):
    """A model with learned positions takes no more tokens than it has positions."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=32, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    saving.save_policy(
        LanguageModelPolicy(str(folder), CompletionTemplate()), tmp_path / "out", True
    )
    assert AutoConfig.from_pretrained(tmp_path / "out").n_positions == 16


def test_a_run_that_cannot_be_read_is_no_fault_of_out(finished_run, monkeypatch, tmp_path):
    def unreadable(*_, **__):
        raise OSError("the disk is gone")

    monkeypatch.setattr(export, "instantiate", unreadable)
    last = finished_run.folder / "checkpoints" / "last.ckpt"
    cfg = OmegaConf.create({"ckpt_path": str(last), "out": str(tmp_path / "out"), "merge": True})
    with pytest.raises(ConfigError, match="^ckpt_path=.*the disk is gone"):
        export.export(cfg)
