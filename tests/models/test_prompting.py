import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from etpo.errors import ConfigError
from etpo.models.chat_template import ChatTemplate
from etpo.models.prompting import CompletionTemplate, InfillingTemplate

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


@pytest.fixture
def sentence_piece():
    """Llama 2's kind of tokenizer over a few letters: a blank goes in front of a text."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "<PRE>", "<SUF>", *"▁[]/INSTWriteUx"]
    pieces = list(dict.fromkeys(pieces))
    return LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


@pytest.fixture
def merging():
    """GPT-2's kind of tokenizer: a line break and the indentation after it are one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", *letters, "ĊĠ", "Ġa"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("Ċ", "Ġ"), ("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", ["Write", " Write ", "W\nU", "Ux Write"])
def test_a_chat_prompt_is_tokenized_as_a_whole(sentence_piece, text):
    sentence_piece.chat_template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    expected = sentence_piece.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    observation = {"instruction": text, "prefix": "", "suffix": ""}
    assert ChatTemplate().encode(sentence_piece, observation, 100).ids == expected
    assert sentence_piece.bos_token_id in expected


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ messages[0].content }}|{{ messages[0].content }}|", "Write|Write|"),
        ("{{ messages[0].content | upper }}|", "WRITE|"),
        ("{{ messages[0].content | trim }}|", "Write|"),
        ("{{ messages[0]['content'][0]['text'] }}|", "Write|"),
        (
            "{% for c in messages[0].content %}{{ c['text'] }}|{% endfor %}",
            "Write|",
        ),
    ],
)
def test_templates_that_write_the_message_in_their_own_way(merging, template, shown):
    merging.chat_template = template
    observation = {"instruction": "Write", "prefix": "", "suffix": ""}
    prompt = ChatTemplate().encode(merging, observation, 100)
    assert merging.decode(prompt.ids) == shown


@pytest.mark.parametrize(
    "template",
    [
        "no message",
        "{{ raise_exception('only tools') }}",
        "{{ messages[0].nothing.more }}",
        "{% for",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_templates_that_show_no_message_are_config_errors(merging, template):
    merging.chat_template = template
    with pytest.raises(ConfigError, match="model.prompt"):
        ChatTemplate().encode(merging, OBSERVATION, 100)


def test_a_chat_prompt_that_is_too_long_is_cut_in_the_message(merging):
    merging.chat_template = "<{{ messages[0].content }}>"
    observation = {"instruction": "abcdefgh", "prefix": "", "suffix": ""}
    prompt = ChatTemplate().encode(merging, observation, 6)
    assert (merging.decode(prompt.ids), prompt.dropped) == ("<efgh>", 4)
    with pytest.raises(ConfigError, match="model.max_prompt_tokens=2"):
        ChatTemplate().encode(merging, observation, 2)


def test_the_suffix_of_an_infilling_prompt_gets_no_blank(sentence_piece):
    template = InfillingTemplate("<PRE>", "<SUF>", "</s>")
    observation = {"instruction": "", "prefix": "Ux", "suffix": "\nWx"}
    ids = template.encode(sentence_piece, observation, 100).ids
    pieces = sentence_piece.convert_ids_to_tokens(ids)
    assert pieces == ["<PRE>", "▁", "U", "x", "<SUF>", "<0x0A>", "W", "x", "</s>"]


@pytest.mark.parametrize(
    ("prefix", "kept", "rest"),
    [
        ("f:\n", "f:", "\n"),
        ("f:\n\n", "f:\n", "\n"),
        ("f: ", "f:", " "),
        ("f:", "f:", ""),
        ("f:\t", "f:\t", ""),
        ("\n", "\n", ""),  # nothing would be left
    ],
)
def test_a_completion_ends_where_its_tokens_cannot_merge_with_an_action(
    merging, prefix, kept, rest
):
    observation = {"instruction": "", "prefix": prefix, "suffix": ""}
    prompt = CompletionTemplate().encode(merging, observation, 100)
    assert (merging.decode(prompt.ids), prompt.rest) == (kept, rest)


def test_an_empty_completion_is_the_bos_token(merging):
    observation = {"instruction": "", "prefix": "", "suffix": ""}
    assert CompletionTemplate().encode(merging, observation, 100).ids == [merging.bos_token_id]
    merging.bos_token = None
    with pytest.raises(ConfigError, match="model.name_or_path=.*BOS"):
        CompletionTemplate().encode(merging, observation, 100)
