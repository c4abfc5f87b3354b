"""`etpo-export`: the folder that it writes loads with transformers and peft, and says the same."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from etpo import export, train
from etpo.models.backbone import tiny_checkpoint

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
    prefix = "backbone.policy."
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
    ):
        ended = command(export.main, *arguments)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith(expected)
        assert ended.err.count("\n") == 1
    assert (full / "mine").read_text() == "kept"
    assert not (tmp_path / "a").exists()
