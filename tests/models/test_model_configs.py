"""Each `conf/model` of a pretrained model: its architecture, and its tokens in the real tokenizer.

Real tokenizers: `make tokenizers`, as for test_real_tokenizers.py.
"""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import AutoTokenizer

from etpo.config import CONF
from etpo.errors import ConfigError
from etpo.models.chat_template import ChatTemplate
from etpo.models.stopping import stop_ids

from .architectures import ARCHITECTURES
from .test_real_tokenizers import folder_of

MODEL_TYPES = {
    "gemma-3": "gemma3_text",
    "llama-3.2": "llama",
    "qwen3-": "qwen3",
    "qwen3.5": "qwen3_5_text",
    "smollm2": "llama",
    "smollm3": "smollm3",
}
TOKENIZERS = {
    "gemma-3": "gemma3",
    "llama-3.2": "llama3_1",
    "qwen3-": "qwen3",
    "smollm2": "smollm2",
}
OPTIONS = [p.stem for p in (CONF / "model").glob("*.yaml") if p.stem.startswith((*MODEL_TYPES,))]
OBSERVATION = {"instruction": "Add 1 and 2.", "prefix": "", "suffix": ""}


def config_of(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides])


def family_of(option, families):
    return next((name for start, name in families.items() if option.startswith(start)), None)


def test_every_family_has_an_architecture_that_is_tested():
    kinds = {architecture.kind for architecture in ARCHITECTURES.values()}
    assert set(MODEL_TYPES.values()) <= kinds
    assert {family_of(option, MODEL_TYPES) for option in OPTIONS} == set(MODEL_TYPES.values())


@pytest.mark.parametrize("option", OPTIONS)
def test_it_trains_an_adapter_and_a_head(option):
    cfg = config_of(f"model={option}")
    assert cfg.model.lora.target_modules == "all-linear"
    assert cfg.critic._target_.endswith("HeadCritic")
    assert config_of(f"model={option}", "critic=lora").critic._target_.endswith("LoraCritic")


@pytest.mark.parametrize("option", [o for o in OPTIONS if family_of(o, TOKENIZERS)])
def test_stop_tokens_are_in_the_real_tokenizer(option, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder_of(family_of(option, TOKENIZERS)))
    model = config_of(f"model={option}").model
    (tmp_path / "config.json").write_text("{}")
    ids = stop_ids(tokenizer, model.stop_tokens, str(tmp_path))
    assert set(model.stop_tokens) <= set(tokenizer.convert_ids_to_tokens(ids))
    # the token that ends the template's turn of the assistant
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shown = tokenizer.apply_chat_template(turns, tokenize=False)
    assert shown.rstrip().endswith(model.stop_tokens[0])


def test_thinking_is_switched_off():
    tokenizer = AutoTokenizer.from_pretrained(folder_of("qwen3"))
    for overrides, end in (
        ((), "<think>\n\n</think>\n\n"),
        (("model/prompt=chat",), "assistant\n"),
    ):
        prompt = instantiate(config_of("model=qwen3-0.6b", *overrides).model.prompt)
        ids = prompt.encode(tokenizer, OBSERVATION, 1000).ids
        assert tokenizer.decode(ids).endswith(end)
    prompt = config_of("model=qwen3-0.6b", "model.prompt.template_kwargs.enable_thinking=true")
    ids = instantiate(prompt.model.prompt).encode(tokenizer, OBSERVATION, 1000).ids
    assert tokenizer.decode(ids).endswith("assistant\n")


def test_a_variable_that_the_template_does_not_read_is_refused(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen-instruct"))
    ChatTemplate(template_kwargs={"enable_thinking": False}).encode(tokenizer, OBSERVATION, 1000)
    with pytest.raises(ConfigError, match="model.prompt.template_kwargs.think=False: allowed"):
        ChatTemplate(template_kwargs={"think": False}).encode(tokenizer, OBSERVATION, 1000)


def test_a_date_makes_a_prompt_repeatable(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama3"))
    prompt = instantiate(config_of("model=llama-3.2-1b").model.prompt)
    assert "26 Jul 2024" in tokenizer.decode(prompt.encode(tokenizer, OBSERVATION, 1000).ids)
