"""Choices: what is sampled, its distribution by plain forwards, and errors in one line."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from etpo.errors import ConfigError
from etpo.generation.sampler import decode_actions, first_decisions, generate
from etpo.models.causal_lm import trunk_of
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.models.token_columns import unpack

from ..models.architectures import ARCHITECTURES, save_architecture
from ..restricted import next_tokens, restricted, tokens_of

ROOMS = ("go north", "go now", "go", "", "look")
FREE = None
CACHE = Path(os.environ.get("ETPO_CACHE", "~/.cache/etpo")).expanduser()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def observation(prefix, choices=FREE):
    made = {"instruction": "", "prefix": prefix, "suffix": ""}
    return made if choices is FREE else made | {"choices": tuple(choices)}


@pytest.fixture
def build(checkpoint):
    """build(...): a policy on a small random Llama whose tokens are bytes."""

    def make(**settings):
        return LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate(), **settings)

    return make


def probabilities(policy, prefix, choices):
    """Probability of each choice: the product of its tokens' restricted softmaxes."""
    prompts = policy.encode([observation(prefix)])
    prompt, rest, found = prompts.ids[0].tolist(), prompts.rests[0], []
    for choice in choices:
        ids = tokens_of(policy, choice, rest)
        options = [next_tokens(policy, choices, ids[:n], rest) for n in range(len(ids))]
        parts = [
            restricted(policy, [*prompt, *ids[:n]], options[n])[token]
            for n, token in enumerate(ids)
        ]
        found.append(torch.stack(parts).prod())
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"min_p": 0.3}], ids=str)
def test_choices_are_drawn_from_the_restricted_softmax(build, settings):
    policy, count = build(**settings), 4000
    prompts = policy.encode([observation("go", ROOMS)] * count)
    texts = decode_actions(policy, prompts, generate(policy, prompts, 9, generator()))
    expected = probabilities(policy, "go", ROOMS)
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    assert (expected == 0).any() == ("min_p" in settings)
    assert (expected > 1e-3).sum() > (1 if "min_p" in settings else 3)
    for choice, p in zip(ROOMS, expected.tolist(), strict=True):
        # five standard deviations of a frequency
        assert abs(texts.count(choice) / count - p) <= 5 * (p * (1 - p) / count) ** 0.5
    assert set(texts) <= set(ROOMS)


def assert_recorded(policy, prompts, taken, model):
    """Steps, token sets and hidden states of a sample are those of plain forwards.

    Returns the texts. A token with a single continuation is no step, unless it is the first of an
    action without any.
    """
    texts = decode_actions(policy, prompts, taken)
    size = policy.vocabulary_size
    for row, (choices, text) in enumerate(zip(prompts.choices, texts, strict=True)):
        ids = taken.ids[row][taken.mask[row]].tolist()
        prompt = prompts.ids[row][prompts.mask[row]].tolist()
        options = [
            None if choices is None else next_tokens(policy, choices, ids[:n], prompts.rests[row])
            for n in range(len(ids))
        ]
        steps = [each is None or len(each) > 1 for each in options]
        steps[0] = steps[0] or not any(steps)
        assert taken.step_mask[row, : len(ids)].tolist() == steps
        assert not taken.step_mask[row, len(ids) :].any()
        if choices is not None:
            assert text in choices
            assert not taken.length_limited[row]
        plain = trunk_of(model)(input_ids=torch.tensor([prompt + ids]), use_cache=False)
        states = plain.last_hidden_state[0, len(prompt) - 1 :]
        for place in range(len(ids)):
            if not steps[place]:
                assert not taken.hidden_states[row, place].any()
                continue
            found = taken.hidden_states[row, place]
            torch.testing.assert_close(found, states[place], rtol=1e-3, atol=1e-4)
            allowed = unpack(taken.allowed[row, place], None, size).nonzero()[:, 0].tolist()
            assert allowed == sorted(range(size) if options[place] is None else options[place])
    return texts


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "window", "shared"),
    [
        ("Llama", None, True),
        ("Llama", None, False),
        ("Mistral", 256, True),
        ("Mistral", 256, False),
        ("Mistral", 8, False),  # shorter than the prompts with their forced tokens
        ("Gemma 3", 8, False),
        ("LFM2", None, False),  # recurrent
        ("Qwen3-Next", None, False),
    ],
)
def test_forced_tokens_are_read_as_in_a_plain_forward(name, window, shared, checkpoint, tmp_path):
    architecture = ARCHITECTURES[name]
    changes = {} if window is None else {"sliding_window": window}
    architecture = architecture._replace(changes=architecture.changes | changes)
    folder = save_architecture(tmp_path / "model", architecture, checkpoint("llama"))
    policy = LanguageModelPolicy(str(folder), CompletionTemplate())
    assert policy.shares_prefixes or not shared
    policy.shares_prefixes = shared
    model = AutoModelForCausalLM.from_pretrained(folder)
    spaces = (
        ("open the red door", "open the blue door", "open it"),  # starts with forced tokens
        ("a", "ab", "abcdefgh", "xyz"),
        ("the only one",),
        FREE,
        ("",),
        ROOMS,
    )
    prefixes = ("x", "a longer prompt", "go")
    rows = [observation(prefixes[n % 3], space) for n, space in enumerate(spaces * 4)]
    prompts = policy.encode(rows)
    taken = generate(policy, prompts, 20, generator())
    texts = assert_recorded(policy, prompts, taken, model)
    assert texts[2] == "the only one"
    assert texts[4] == ""
    assert taken.step_mask[2].sum() == 1
    forced = (taken.mask & ~taken.step_mask).sum(1)
    assert forced.max() > 10


@torch.no_grad()
def test_a_prompt_leaves_white_space_to_the_choice(build):
    policy = build()
    prompts = policy.encode([observation("go", ("up", "down"))] * 8)._replace(rests=(" ",) * 8)
    taken = generate(policy, prompts, 9, generator())
    texts = assert_recorded(policy, prompts, taken, policy.model)
    assert set(texts) == {"up", "down"}
    (blank,) = policy.tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert (taken.ids[:, 0] == blank).all()
    assert not taken.step_mask[:, 0].any()


@torch.no_grad()
def test_greedy_takes_the_likeliest_allowed_token(build):
    policy = build()
    spaces = (ROOMS, ("x", "yy"), FREE, ROOMS)  # equal prompts with other choices are not one
    prompts = policy.encode([observation("go", space) for space in spaces])
    taken = generate(policy, prompts, 9, None)
    assert_recorded(policy, prompts, taken, policy.model)
    assert taken.ids[0].tolist() == taken.ids[3].tolist()
    for row, choices in enumerate(spaces):
        ids = taken.ids[row][taken.mask[row]].tolist()
        prompt = prompts.ids[row][prompts.mask[row]].tolist()
        for place in taken.step_mask[row].nonzero()[:, 0].tolist():
            options = choices and next_tokens(policy, choices, ids[:place])
            p = restricted(policy, prompt + ids[:place], options)
            assert ids[place] == int(p.argmax())


@torch.no_grad()
def test_support_is_what_min_p_keeps_of_the_allowed_tokens(build):
    policy = build(min_p=0.4)
    prompts = policy.encode([observation("go", ROOMS), observation("go")] * 20)
    taken = generate(policy, prompts, 9, generator())
    cut = 0
    for row, place in taken.step_mask.nonzero().tolist():
        ids, choices = taken.ids[row, :place].tolist(), prompts.choices[row]
        options = choices and next_tokens(policy, choices, ids)
        prompt = prompts.ids[row][prompts.mask[row]].tolist()
        p = restricted(policy, prompt + ids, options)
        sets = taken.support[row, place], taken.allowed[row, place]
        support, allowed = (unpack(each, None, len(p)) for each in sets)
        assert torch.equal(support, p > 0)
        cut += int((allowed & ~support).sum())
    assert cut > 10
    # without choices in the batch there is no set of allowed tokens
    taken = generate(policy, policy.encode([observation("go")]), 3, generator())
    assert taken.allowed.shape[-1] == 0
    assert taken.support.shape[-1] == 9


def test_an_action_ends_with_a_stop_string_of_one_token(build):
    policy = build(stop_strings=["\n"])
    prompts = policy.encode([observation("go", ROOMS), observation("go", ("look",))] * 10)
    taken = generate(policy, prompts, 9, generator())
    (newline,) = policy.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert set(decode_actions(policy, prompts, taken)) <= set(ROOMS)
    last = taken.mask.sum(1, keepdim=True) - 1
    assert (taken.ids.gather(1, last) == newline).all()


def test_first_decisions_are_the_first_steps_of_actions(build):
    policy = build()
    spaces = (ROOMS, ("open the door", "open it"), FREE, ("wait",), ROOMS)
    prompts = policy.encode([observation("go", space) for space in spaces])
    taken = generate(policy, prompts, 14, generator())
    first = first_decisions(policy, prompts, 14, None)
    assert first.step_mask.sum(1).tolist() == [1] * 5
    places = taken.step_mask.int().argmax(1).tolist()
    assert first.step_mask.int().argmax(1).tolist() == places == [0, 5, 0, 0, 0]
    for row, place in enumerate(places):
        assert first.action_ids[row, :place].tolist() == taken.ids[row, :place].tolist()
        size = policy.vocabulary_size
        sets = first.allowed[row, place], taken.allowed[row, place]
        one, other = (unpack(each, None, size) for each in sets)
        assert torch.equal(one, other)
    assert first_decisions(policy, policy.encode([observation("go")]), 4, None).allowed.numel() == 0


@pytest.mark.parametrize(
    ("choices", "settings", "limit", "words"),
    [
        (("Up",), {}, 9, "'Up' reads 'up' as tokens .*allowed are texts that the tokenizer"),
        (("a;b",), {"stop_strings": [";"]}, 9, r"'a;b' reads 'a' .*stop_strings \[';'\]"),
        (("a</s>b",), {}, 9, "'a</s>b' .*allowed are texts"),
        (("ab", "abcd"), {}, 4, "max_new_tokens=4: the choice 'abcd' needs 5; allowed are 5"),
    ],
)
def test_choices_that_cannot_be_actions_are_one_line(build, choices, settings, limit, words):
    policy = build(**settings)
    policy.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    prompts = policy.encode([observation("go", choices)])
    for call in (
        lambda: generate(policy, prompts, limit, generator()),
        lambda: first_decisions(policy, prompts, limit, None),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def smollm2():
    folder = CACHE / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}; set ETPO_CACHE")
    return LanguageModelPolicy(str(folder), CompletionTemplate(), stop_strings=["\n"])


@pytest.mark.slow
@torch.no_grad()
def test_a_pretrained_model_chooses(smollm2):
    """Tokens of several characters, and a prompt that ends with a blank."""
    choices = ("go to the kitchen", "go to the garden", "open the chest", "open the chest again")
    spaces = (choices, ("take the key",), FREE, ("7", "42", "4200"))
    texts = ("You are in a hall.\nNext: ", "A key lies here.\nNext:", "1 + 1 =", "6 x 7 = ")
    pairs = zip(texts * 3, spaces * 3, strict=True)
    prompts = smollm2.encode([observation(*pair) for pair in pairs])
    taken = generate(smollm2, prompts, 12, generator())
    assert_recorded(smollm2, prompts, taken, smollm2.model)

    count = 400
    prompts = smollm2.encode([observation(texts[0], choices)] * count)
    drawn = decode_actions(smollm2, prompts, generate(smollm2, prompts, 12, generator()))
    expected = probabilities(smollm2, texts[0], choices)
    assert expected.sum() == pytest.approx(1, abs=1e-4)
    for choice, p in zip(choices, expected.tolist(), strict=True):
        assert abs(drawn.count(choice) / count - p) <= 5 * (p * (1 - p) / count) ** 0.5
