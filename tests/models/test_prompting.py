import pytest
from transformers import AutoTokenizer

from etpo.errors import ConfigError
from etpo.models.prompting import ChatTemplate, CompletionTemplate, InfillingTemplate

OBSERVATION = {"instruction": "write code", "prefix": "def f():\n", "suffix": "\nf()"}


def encode(template, folder, max_tokens=100):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = template.encode(tokenizer, OBSERVATION, max_tokens)
    return tokenizer.decode(prompt.ids), prompt


def test_completion_is_the_prefix(checkpoint):
    assert encode(CompletionTemplate(), checkpoint("llama"))[0] == "def f():\n"


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("codellama", ("▁<PRE>", "▁<SUF>", "▁<MID>")),
        ("qwen", ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")),
        ("deepseek", ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")),
        ("starcoder", ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")),
    ],
)
def test_infilling_puts_prefix_suffix_middle(checkpoint, family, tokens):
    begin, hole, end = tokens
    text, prompt = encode(InfillingTemplate(begin, hole, end), checkpoint(family))
    assert text == f"{begin}def f():\n{hole}\nf(){end}"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    # control tokens are single ids, not spelled out
    assert prompt.ids[0] == tokenizer.convert_tokens_to_ids(begin)
    assert prompt.ids[-1] == tokenizer.convert_tokens_to_ids(end)


def test_chat_is_one_user_turn(checkpoint):
    text, _ = encode(ChatTemplate(), checkpoint("qwen-instruct"))
    assert text == "<|im_start|>user\nwrite code<|im_end|>\n<|im_start|>assistant\n"


def test_long_prompts_lose_their_oldest_text_tokens(checkpoint):
    template = InfillingTemplate("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    # 3 control tokens and 4 bytes of suffix leave 5 of the 9 bytes of the prefix
    text, prompt = encode(template, checkpoint("starcoder"), max_tokens=12)
    assert text == "<fim_prefix>f():\n<fim_suffix>\nf()<fim_middle>"
    assert prompt.dropped == 4


def test_no_room_and_unknown_tokens_are_config_errors(checkpoint):
    template = InfillingTemplate("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    with pytest.raises(ConfigError, match=r"model.max_prompt_tokens=7"):
        encode(template, checkpoint("starcoder"), max_tokens=7)
    with pytest.raises(ConfigError, match="has no token '<fim_prefix>'"):
        encode(template, checkpoint("llama"))
    with pytest.raises(ConfigError, match="no chat template"):
        encode(ChatTemplate(), checkpoint("llama"))
