import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from etpo.errors import ConfigError
from etpo.models.critics import polyak_update
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.models.token_columns import TokenColumns, pack, unpack

from ..by_token import distribution

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def observations(*prefixes):
    return [{"instruction": "", "prefix": p, "suffix": ""} for p in prefixes]


def build(folder, **settings):
    return LanguageModelPolicy(str(folder), CompletionTemplate(), **settings)


def after_prompt(policy, prompts, **options):
    """The distribution of the first token after each prompt."""
    return distribution(policy, prompts.ids, prompts.mask, prompts.ids[:, :1], **options)


@pytest.mark.parametrize("lora", [None, LORA])
def test_reference_is_the_pretrained_policy_and_stays(checkpoint, lora):
    policy = build(checkpoint("llama"), lora=lora)
    prompts = policy.encode(observations("hello", "a longer prompt"))
    before = after_prompt(policy, prompts, reference=True)
    torch.testing.assert_close(
        after_prompt(policy, prompts).log_probs, before.log_probs, rtol=0, atol=1e-6
    )
    for parameter in policy.trainable_parameters():
        parameter.data.add_(0.1)
    after = after_prompt(policy, prompts, reference=True)
    assert torch.equal(before.log_probs, after.log_probs)
    assert (after_prompt(policy, prompts).log_probs - after.log_probs).abs().max() > 1e-2


def test_padding_changes_nothing(checkpoint):
    policy = build(checkpoint("llama"))
    alone = policy.encode(observations("hello"))
    padded = policy.encode(observations("hello", "a longer prompt"))
    action = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(
        distribution(policy, padded.ids, padded.mask, action.expand(2, -1)).log_probs[0],
        distribution(policy, alone.ids, alone.mask, action).log_probs[0],
        rtol=0,
        atol=1e-5,
    )


def test_padded_vocabulary_ids_have_no_probability(checkpoint):
    policy = build(checkpoint("llama"))
    prompts = policy.encode(observations("hello"))
    log_probs = after_prompt(policy, prompts).log_probs
    assert log_probs.shape[-1] == policy.vocabulary_size == 256 + 3
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, 1))


def test_temperature_is_part_of_the_policy(checkpoint):
    cold, warm = (build(checkpoint("llama"), temperature=t) for t in (0.5, 1.0))
    prompts = cold.encode(observations("hello"))
    halved = torch.log_softmax(2 * after_prompt(warm, prompts).log_probs, -1)
    torch.testing.assert_close(after_prompt(cold, prompts).log_probs, halved)


def test_min_p_leaves_the_likely_tokens_and_those_that_were_taken(checkpoint):
    whole, cut = (build(checkpoint("llama"), min_p=min_p) for min_p in (0.0, 0.2))
    prompts = whole.encode(observations("hello", "a longer prompt", "x"))
    full = distribution(
        whole, prompts.ids, prompts.mask, torch.zeros(len(prompts.ids), 1).long()
    ).log_probs
    taken = full.argmin(-1)  # far below the limit
    p = full[:, 0].exp()
    kept = (p >= 0.2 * p.amax(-1, keepdim=True)).scatter(-1, taken, True)
    assert (~kept).any()
    expected = torch.where(kept, p, 0.0)
    expected = expected / expected.sum(-1, keepdim=True)
    inputs = prompts.ids, prompts.mask, taken
    torch.testing.assert_close(distribution(cut, *inputs).log_probs[:, 0].exp(), expected)
    kept_mass = torch.where(kept, p, 0.0).sum(-1)
    torch.testing.assert_close(distribution(cut, *inputs).log_support_mass[:, 0].exp(), kept_mass)
    assert (distribution(whole, *inputs).log_support_mass == 0).all()
    reference = distribution(cut, *inputs, reference=True).log_probs
    torch.testing.assert_close(reference, full)
    support = torch.rand(full.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    held = distribution(cut, *inputs, support=support).log_probs
    assert torch.equal(held.isfinite(), support)
    held[support].sum().backward()
    assert all(p.grad.isfinite().all() for p in cut.trainable_parameters() if p.grad is not None)


@pytest.mark.parametrize("lora", [None, LORA, LORA | {"target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize(("family", "min_p"), [("llama", 0.3), ("cohere", 0.95)])
@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_a_distribution_over_some_columns_is_that_over_their_tokens(
    checkpoint, family, min_p, lora, reference
):
    policy = build(checkpoint(family), lora=lora, temperature=0.7, min_p=min_p)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable_parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(6, policy.hidden_size, generator=generator)
    size = policy.vocabulary_size
    allowed = torch.rand(6, size, generator=generator) < 0.03
    bits = pack(allowed, None, size)
    ids = TokenColumns.of(size, bits).ids
    assert 3 < len(ids) < size / 2
    support = unpack(policy.supported(hidden, bits)[2], None, size)
    p = (policy.logits(hidden) / 0.7).where(allowed, -torch.inf).softmax(-1)
    assert torch.equal(support, allowed & (p >= min_p * p.amax(-1, keepdim=True)))
    assert (support.sum(1) < allowed.sum(1)).any()
    logits = policy.logits(hidden, reference=reference) / 0.7
    whole = logits.where(allowed, -torch.inf).log_softmax(-1)
    mass = whole.logsumexp(-1) - whole.where(support, -torch.inf).logsumexp(-1)
    for sets in ((bits,), (bits, policy.supported(hidden, bits)[2])):
        kept = support if len(sets) == 2 or not reference else allowed
        expected = logits.where(kept, -torch.inf).log_softmax(-1)[:, ids]
        found, log_mass = policy.log_probs(
            hidden, TokenColumns.of(size, *sets), reference=reference
        )
        torch.testing.assert_close(found, expected)
        inside = -mass if kept is support else torch.zeros(6)
        torch.testing.assert_close(log_mass, inside)


def test_decode_drops_stop_token_and_stop_string(checkpoint):
    policy = build(checkpoint("llama"), stop_strings=["\ndef "])
    ids = policy.tokenizer("x = 1\ndef ", add_special_tokens=False)["input_ids"]
    assert policy.decode(ids) == "x = 1"
    assert policy.decode([*ids[:5], policy.tokenizer.eos_token_id]) == "x = 1"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("END", ["END"]),
        (["END", "\n"], ["END", "\n"]),
        ([r"\n", r"\nEnd\t", r"\r\n"], ["\n", "\nEnd\t", "\r\n"]),
        ([r"\\n", r"\boxed", r"\\\n"], [r"\n", r"\boxed", "\\\n"]),
        ((), []),
        (None, []),
    ],
)
def test_stop_strings_mean_what_they_mean_in_python(checkpoint, given, meant):
    assert build(checkpoint("llama"), stop_strings=given).stop_strings == meant


@pytest.mark.parametrize("key", ["stop_strings", "stop_tokens"])
@pytest.mark.parametrize("given", ["", [""], ["a", ""], [5], [None], 5, {"a": 1}])
def test_stop_strings_and_tokens_are_texts(checkpoint, key, given):
    with pytest.raises(ConfigError, match=f"model.{key}="):
        build(checkpoint("llama"), **{key: given})


def test_a_stop_token_may_be_given_alone(checkpoint):
    folder = checkpoint("qwen-instruct")
    alone, listed = (build(folder, stop_tokens=t) for t in ("<|im_end|>", ["<|im_end|>"]))
    assert alone.stop_ids == listed.stop_ids
    assert len(alone.stop_ids) == 2
    with pytest.raises(ConfigError, match="model.stop_tokens.*'end'"):
        build(folder, stop_tokens="end")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([1, 106], 1, [1, 106]),
        (107, 1, [1, 107]),
        (None, [1, 108], [1, 108]),
        (None, 109, [1, 109]),
        ([1, 100_000], 1, [1]),  # the tokenizer has no such token
    ],
)
def test_ends_that_the_model_names_end_an_action(
    checkpoint, tmp_path, generation, config, expected
):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        GenerationConfig(eos_token_id=generation).save_pretrained(folder)
    assert build(folder).stop_ids == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "model.dtype=int8: allowed are float32, bfloat16, float16"),
        ({"stop_tokens": ["<nope>"]}, "model.stop_tokens: the tokenizer has no token '<nope>'"),
    ],
)
def test_bad_values_are_config_errors(checkpoint, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(checkpoint("llama"), **settings)


def test_a_folder_without_a_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="model.name_or_path=.*not a causal language model"):
        build(tmp_path)


@pytest.fixture
def with_tokens(checkpoint, tmp_path):
    """with_tokens(change): a checkpoint whose tokenizer was changed."""

    def make(change):
        folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def beyond(tokenizer):
    """Eight added tokens, the last of which has no row in the embedding of 266."""
    tokenizer.add_tokens([f"<extra {i}>" for i in range(8)], special_tokens=True)


def test_a_token_without_a_row_is_refused_where_a_prompt_has_it(with_tokens):
    policy = build(with_tokens(beyond))
    assert policy.vocabulary_size == 266
    policy.encode(observations("hello <extra 6>"))
    with pytest.raises(ConfigError, match="model.name_or_path=.*<extra 7>.*266"):
        policy.encode(observations("hello <extra 7>"))


def test_a_pad_token_without_a_row_is_not_looked_up(with_tokens):
    def change(tokenizer):
        beyond(tokenizer)
        tokenizer.pad_token = "<extra 7>"

    policy = build(with_tokens(change))
    assert policy.pad_id == policy.tokenizer.eos_token_id
    prompts = policy.encode(observations("hello", "a longer prompt"))
    assert after_prompt(policy, prompts).log_probs.isfinite().all()


def test_an_end_that_cannot_be_sampled_is_refused(with_tokens):
    def change(tokenizer):
        beyond(tokenizer)
        tokenizer.eos_token = "<extra 7>"

    folder = with_tokens(change)
    assert build(folder).stop_ids[0] == 1  # the model names another end
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(ConfigError, match="model.stop_tokens"):
        build(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(200)
    model.save_pretrained(folder)
    with pytest.raises(ConfigError, match="model.name_or_path=.*259 tokens.*200"):
        build(folder)


def test_polyak_update_is_an_average():
    target, source = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.75 * target.weight + 0.25 * source.weight
    polyak_update(target, source, 0.25)
    torch.testing.assert_close(target.weight, expected)
