"""Checkpoints that are none, or not whole: one line with the key, before anything is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from etpo.errors import ConfigError
from etpo.models.loading import load_model, load_tokenizer
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a whole checkpoint with untied weights."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def load(folder, attn_implementation="sdpa"):
    load_tokenizer(str(folder))
    return load_model(str(folder), "float32", attn_implementation)


def refusal(folder, *words):
    """The one line with which a folder is refused."""
    with pytest.raises(ConfigError) as caught:
        load(folder)
    line = str(caught.value)
    assert line.startswith(f"model.name_or_path={folder}: ")
    assert "\n" not in line
    for word in words:
        assert word in line
    return line


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda w: {f"module.{name}": x for name, x in w.items()}, "module.lm_head.weight"),
        (lambda w: {n: x for n, x in w.items() if n != "lm_head.weight"}, "lm_head.weight"),
        (lambda w: {n: x for n, x in w.items() if "layers.1" not in n}, "model.layers.1"),
    ],
    ids=["another prefix", "no output layer", "a layer too few"],
)
def test_missing_weights_are_refused(folder, capfd, change, missing):
    change_weights(folder, change)
    refusal(folder, missing, "lack")
    assert "MISSING" not in capfd.readouterr().err  # the table of transformers


def test_weights_of_another_shape_are_refused(folder):
    change_config(folder, vocab_size=300)
    refusal(folder, "[266, 32]", "[300, 32]")


def test_tied_weights_are_not_missing(folder):
    change_config(folder, tie_word_embeddings=True)
    change_weights(folder, lambda w: {n: x for n, x in w.items() if n != "lm_head.weight"})
    model = load(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_that_the_model_does_not_have_are_named(folder):
    whole = load(folder).state_dict()
    change_weights(folder, lambda w: w | {"vision_tower.weight": torch.zeros(2)})
    with pytest.warns(UserWarning, match="vision_tower.weight"):
        model = load(folder)
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", POINTER),
        ("tokenizer.json", POINTER),
        ("config.json", POINTER),
        ("model.safetensors", "\0" * 100),
        ("model.safetensors", ""),
        ("tokenizer.json", "{"),
        ("config.json", "{"),
    ],
)
def test_damaged_files_are_named(folder, name, content):
    (folder / name).write_text(content)
    line = refusal(folder, name)
    assert ("git lfs pull" in line) == (content == POINTER)


def test_a_file_that_was_cut_off_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    refusal(folder, "model.safetensors")


def test_a_missing_shard_is_named(folder):
    file = folder / "model.safetensors"
    shard = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    refusal(folder, shard)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "t5"}, "t5"),
        ({"model_type": "llava"}, "llava"),
        ({"model_type": "bart"}, "decoder alone"),
        ({"num_attention_heads": 3}, "multiple"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"pad_token_id": 9999}, "adding_idx"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "4-bit"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    ],
)
def test_configurations_that_cannot_be_loaded_say_why(folder, changes, words):
    change_config(folder, **changes)
    refusal(folder, words)


def test_code_of_a_checkpoint_is_not_run_and_nobody_is_asked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change_config(folder, model_type="nonsense", auto_map=code)
    (folder / "code.py").write_text("raise SystemExit('run')\n")
    refusal(folder, "custom code")


def test_an_adapter_is_refused(folder):
    adapter = get_peft_model(load(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(folder)
    refusal(folder, "adapter")


def test_a_folder_without_a_tokenizer_says_so(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refusal(folder, "tokenizer")


@pytest.mark.parametrize("name", ["", None, 7, "a b/c", "nobody/no-model"])
def test_names_of_no_model_are_refused(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"model.name_or_path={name}: "):
        load_tokenizer(name)


def test_a_tilde_is_the_home_folder(checkpoint, monkeypatch):
    folder = checkpoint("llama")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert LanguageModelPolicy(f"~/{folder.name}", CompletionTemplate()).vocabulary_size == 259


def test_a_model_without_sdpa_names_eager(folder):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config = Gemma2Config(vocab_size=266, **sizes)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    line = str(caught.value)
    assert line.startswith("model.attn_implementation=sdpa: ")
    assert "eager" in line
    assert line.endswith("28005)")  # the reason is whole
    assert load(folder, "eager").config.model_type == "gemma2"


def test_the_language_model_of_a_multimodal_checkpoint_is_taken_without_a_warning(folder, recwarn):
    """Qwen3.5 is published with a vision tower."""
    text = {"vocab_size": 266, "hidden_size": 32, "intermediate_size": 64, "eos_token_id": 1}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
    text |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
    text |= {f"linear_{part}_head_dim": 16 for part in ("key", "value")}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = Qwen3_5Config(text_config=text, vision_config=vision | {"out_hidden_size": 32})
    whole = Qwen3_5ForConditionalGeneration(config)
    whole.save_pretrained(folder)
    policy = LanguageModelPolicy(str(folder), CompletionTemplate())
    assert not [w for w in recwarn if "leaves out" in str(w.message)]
    assert policy.model.config.model_type == "qwen3_5_text"
    expected = whole.model.language_model.state_dict()
    loaded = policy.model.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.items())
