"""A GGUF file is loaded, trained, resumed and exported like the folder that it was made of."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from etpo import export, train
from etpo.errors import ConfigError
from etpo.models import gguf_file
from etpo.models.chat_template import ChatTemplate
from etpo.models.loading import load_model, load_tokenizer
from etpo.models.policy import LanguageModelPolicy

from .gguf_checkpoint import write_gguf

OBSERVATION = {"instruction": "Write é.", "prefix": "", "suffix": ""}
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def file(checkpoint, tmp_path) -> Path:
    return write_gguf(checkpoint("qwen-instruct"), tmp_path / "model.gguf")


def policy_of(path, **settings):
    return LanguageModelPolicy(str(path), ChatTemplate(), stop_tokens="<|im_end|>", **settings)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def refusal(file):
    with pytest.raises(ConfigError, match=f"model.name_or_path={file}: ") as caught:
        load_model(str(file), "float32", "sdpa")
    return str(caught.value)


def test_a_file_equals_its_folder_and_other_files_of_its_folder_are_not_read(file, checkpoint):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(checkpoint("codellama") / name, file.parent)
    (file.parent / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    one, other = policy_of(file), policy_of(checkpoint("qwen-instruct"))
    assert torch.equal(logits(one.model), logits(other.model))
    assert one.stop_ids == other.stop_ids
    assert one.encode([OBSERVATION]).ids.tolist() == other.encode([OBSERVATION]).ids.tolist()
    assert one.tokenizer.chat_template == other.tokenizer.chat_template
    assert "▁<PRE>" not in one.tokenizer.get_vocab()


def test_its_type_is_that_of_the_configuration(file):
    model = load_model(str(file), "bfloat16", "eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_a_missing_file_says_so(tmp_path):
    assert "no such file" in refusal(tmp_path / "nothing.gguf")


def test_a_missing_package_is_named(file, monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    assert "pip install 'etpo[gguf]'" in refusal(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: b"hello", "damaged"),
        (lambda whole: b"", "damaged"),
        (lambda whole: whole[:100], "damaged"),
        (lambda whole: whole[: len(whole) // 2], "damaged"),
        (lambda whole: whole[:-1], "damaged"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_files_that_are_none_or_cut_off_are_named(file, content, words):
    file.write_bytes(content(file.read_bytes()))
    assert f"{file.name} is" in refusal(file)
    assert words in refusal(file)


def test_an_architecture_that_transformers_cannot_read_is_named(checkpoint, tmp_path):
    file = write_gguf(checkpoint("qwen-instruct"), tmp_path / "other.gguf", "rwkv6")
    assert "rwkv6" in refusal(file)
    with pytest.raises(ConfigError, match="rwkv6"):
        load_tokenizer(str(file))


def test_a_file_is_trained_resumed_and_exported(file, command, tmp_path):
    model = ("model=chat_lm", f"model.name_or_path={file}", "model.max_prompt_tokens=600")
    budget = ("rollout.num_envs=2", "rollout.actions_per_iteration=2", "rollout.max_new_tokens=4")
    budget += (
        "rollout.minibatch_size=2",
        "rollout.update_epochs=1",
        "environment.dataset=iris",
        "environment.n_splits=1",
    )
    budget += ("trainer.max_epochs=1", "model.gradient_checkpointing=false")
    ended = command(train.main, *model, *budget, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.status == 0, ended.err
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    ended = command(train.main, f"ckpt_path={last}", "trainer.max_epochs=2")
    assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 2
    expected = logits(export.load_policy(str(last)).model)
    for merge, kind in (("true", AutoModelForCausalLM), ("false", AutoPeftModelForCausalLM)):
        out = tmp_path / merge
        ended = command(export.main, f"ckpt_path={last}", f"out={out}", f"merge={merge}")
        assert ended.status == 0, ended.err
        source = {} if merge == "true" else {"gguf_file": file.name}
        again = kind.from_pretrained(out, **source)
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
