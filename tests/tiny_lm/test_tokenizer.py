"""The shipped tokenizer loses nothing and makes programs short."""

import random

import pytest

from tiny_lm.corpus import sample_example


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n  \t\r\n",
        "naïve 日本語 😀 \u200b",
        "".join(map(chr, range(256))),
        "def f():\n\treturn {'a': [1.5e-3, None]}  # x != y",
        "    return model\n        return model\n",
    ],
)
def test_text_survives_a_round_trip(text, shipped_tokenizer):
    ids = shipped_tokenizer(text)["input_ids"]
    assert shipped_tokenizer.decode(ids) == text


def test_random_text_survives_a_round_trip(shipped_tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        points = (rng.choice((rng.randrange(128), rng.randrange(0xD800))) for _ in range(40))
        text = "".join(map(chr, points))
        assert shipped_tokenizer.decode(shipped_tokenizer(text)["input_ids"]) == text


def test_every_byte_has_a_token(shipped_tokenizer):
    assert len(shipped_tokenizer) <= 1100
    for code in range(0x80, 0x10FFFF, 4001):
        if not 0xD800 <= code < 0xE000:
            ids = shipped_tokenizer(chr(code))["input_ids"]
            assert shipped_tokenizer.decode(ids) == chr(code)


def test_programs_are_short(programs, shipped_tokenizer):
    lengths = []
    for program in programs:
        ids = shipped_tokenizer(program.render())["input_ids"]
        assert shipped_tokenizer.decode(ids) == program.render()
        lengths.append(len(ids) + 1)
    assert sum(lengths) / len(lengths) < 25
    assert max(lengths) < 70


def test_prompts_survive_and_nothing_is_added(shipped_tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        prompt = sample_example(rng).prompt
        ids = shipped_tokenizer(prompt)["input_ids"]
        assert shipped_tokenizer.decode(ids) == prompt
        assert not set(shipped_tokenizer.all_special_ids) & set(ids)


def test_text_is_never_a_control_token(shipped_tokenizer):
    specials = shipped_tokenizer.all_special_ids
    assert len(set(specials)) == 3
    text = f"x = '{shipped_tokenizer.eos_token}{shipped_tokenizer.pad_token}'"
    ids = shipped_tokenizer(text)["input_ids"]
    assert not set(specials) & set(ids)
    assert shipped_tokenizer.decode(ids) == text
