"""Grammars: only texts that they generate are sampled, and errors in one line."""

import json
import re
import sys

import pytest
import torch
from omegaconf import OmegaConf

from etpo.errors import ConfigError
from etpo.generation.grammar import check_grammar
from etpo.generation.sampler import decode_actions, first_decisions, generate
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.models.token_columns import unpack

from ..restricted import restricted

OBSERVATION = {"instruction": "", "prefix": "go", "suffix": ""}
COLOURS = {"regex": "(red|blue) [0-9]{1,3}"}
MOVES = {
    "type": "object",
    "properties": {"move": {"enum": ["left", "right"]}, "steps": {"type": "integer"}},
    "required": ["move", "steps"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LISTS = {"ebnf": 'start: "take " NAME ("," NAME)*\nNAME: /[a-c]{1,3}/'}


@pytest.fixture(scope="module")
def policy(checkpoint):
    return LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())


def sample(policy, grammar, count=64, limit=60, observations=(OBSERVATION,)):
    """Return prompts, a sample, and the texts of the actions that ended themselves."""
    prompts = policy.encode([*observations] * count)
    generator = torch.Generator().manual_seed(0)
    taken = generate(policy, prompts, limit, generator, check_grammar(grammar))
    rows = zip(decode_actions(policy, prompts, taken), taken.length_limited, strict=True)
    texts = [text for text, limited in rows if not limited]
    assert len(texts) > len(prompts.ids) / 4
    return prompts, taken, texts


def test_a_regular_expression(policy):
    _, taken, texts = sample(policy, COLOURS)
    assert not taken.length_limited.any()
    assert all(re.fullmatch(COLOURS["regex"], text) for text in texts)
    assert {text.split()[0] for text in texts} == {"red", "blue"}
    # "r" forces "ed ", and "b" forces "lue "; nothing else is forced but the end after three digits
    for ids, steps, mask in zip(taken.ids, taken.step_mask, taken.mask, strict=True):
        text = policy.decode(ids[mask].tolist())
        word, number = text.split(" ")
        forced = [True] + [False] * len(word) + [True] * len(number) + [len(number) < 3]
        assert steps[mask].tolist() == forced


def test_a_json_schema(policy):
    _, _, texts = sample(policy, {"json_schema": MOVES})
    for text in texts:
        value = json.loads(text)
        assert set(value) == {"move", "steps"}
        assert value["move"] in ("left", "right")
        assert isinstance(value["steps"], int)
    assert len(set(texts)) > 3


def test_a_grammar_of_rules(policy):
    _, _, texts = sample(policy, LISTS)
    assert all(re.fullmatch("take [a-c]{1,3}(,[a-c]{1,3})*", text) for text in texts)
    assert any("," in text for text in texts)


@torch.no_grad()
def test_texts_have_the_probability_of_the_restricted_softmax(policy):
    count, pairs = 2000, ("ax", "ay", "bx", "by")
    prompts, _, texts = sample(policy, {"regex": "[ab][xy]"}, count, limit=4)
    start = prompts.ids[0].tolist()
    tokens = {letter: policy.tokenizer(letter)["input_ids"][0] for letter in "abxy"}
    for text in pairs:
        p = 1.0
        for place, options in enumerate(("ab", "xy")):
            before = start + [tokens[letter] for letter in text[:place]]
            found = restricted(policy, before, {tokens[letter] for letter in options})
            p *= float(found[tokens[text[place]]])
        assert abs(texts.count(text) / count - p) <= 5 * (p * (1 - p) / count) ** 0.5
    assert set(texts) <= set(pairs)


def test_choices_replace_the_grammar(policy):
    observations = OBSERVATION, OBSERVATION | {"choices": ("wait", "look")}
    prompts, taken, _ = sample(policy, COLOURS, observations=observations)
    texts = decode_actions(policy, prompts, taken)
    assert set(texts[1::2]) == {"wait", "look"}
    assert all(re.fullmatch(COLOURS["regex"], text) for text in texts[::2])
    first = first_decisions(policy, prompts, 60, check_grammar(COLOURS))
    sets = unpack(first.allowed[:2, 0], None, policy.vocabulary_size)
    spelled = [policy.decode(row.nonzero()[:, 0].tolist()) for row in sets]
    assert [sorted(each) for each in spelled] == [["b", "r"], ["l", "w"]]


def test_an_action_may_be_cut_by_its_length(policy):
    prompts = policy.encode([OBSERVATION] * 8)
    generator = torch.Generator().manual_seed(0)
    taken = generate(policy, prompts, 3, generator, check_grammar({"regex": "[a-z]{9}"}))
    assert taken.length_limited.all()
    assert all(re.fullmatch("[a-z]{3}", t) for t in decode_actions(policy, prompts, taken))
    # all that is forced within the length leaves the first token as the step
    taken = generate(policy, prompts, 3, generator, check_grammar({"regex": "abcdef[xy]"}))
    assert decode_actions(policy, prompts, taken) == ["abc"] * 8
    assert taken.step_mask.tolist() == [[True, False, False]] * 8


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ({"regex": "(a"}, r"environment\.grammar\.regex='\(a': it does not compile, .*allowed are"),
        ({"json_schema": {"type": "nothing"}}, r"environment\.grammar\.json_schema=.*not compile"),
        ({"json_schema": "{"}, r"environment\.grammar\.json_schema='\{': it does not compile"),
        ({"ebnf": "start: other"}, r"environment\.grammar\.ebnf='start: other': it does not"),
    ],
)
def test_a_grammar_that_does_not_compile_is_one_line(policy, grammar, words):
    with pytest.raises(ConfigError, match=words) as caught:
        sample(policy, grammar, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["[0-9]+", {"bnf": "a"}, {}, {"regex": "a", "ebnf": "b"}, ["regex"], 5], ids=str
)
def test_a_grammar_is_of_one_kind(value):
    with pytest.raises(ConfigError, match=r"environment\.grammar=.*: allowed is one of regex, "):
        check_grammar(value)


def test_a_schema_may_be_written_in_the_configuration():
    assert check_grammar(None) is None
    written = check_grammar(OmegaConf.create({"json_schema": MOVES}))
    assert json.loads(written["json_schema"]) == MOVES
    assert check_grammar({"json_schema": json.dumps(MOVES)}) == {"json_schema": json.dumps(MOVES)}


def test_a_prompt_that_ends_with_white_space_is_refused(policy):
    prompts = policy.encode([OBSERVATION])._replace(rests=(" ",))
    with pytest.raises(ConfigError, match="prompt ends with ' '.*without white space"):
        generate(policy, prompts, 9, None, COLOURS)


def test_the_package_is_named_where_it_is_missing(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r'needs llguidance: pip install -e "\.\[grammar\]"'):
        sample(policy, {"regex": "not compiled yet"}, 1)


def test_a_tokenizer_that_is_not_fast_is_one_line(policy, monkeypatch):
    def refused(*args, **kwargs):
        raise ValueError("Only fast tokenizers are supported")

    monkeypatch.setattr("llguidance.hf.from_tokenizer", refused)
    with pytest.raises(ConfigError, match="Only fast tokenizers are supported"):
        sample(policy, {"regex": "nor this"}, 1)
