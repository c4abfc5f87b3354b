"""The probe finds what padding or a cache changes, and lets rounding pass."""

import pytest
import torch

from etpo.errors import ConfigError
from etpo.models import probe
from etpo.models.causal_lm import trunk_of
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate


def build(folder, **settings):
    return LanguageModelPolicy(str(folder), CompletionTemplate(), **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen", "cohere"])
def test_models_that_padding_leaves_alone_pass(checkpoint, family, dtype):
    build(checkpoint(family), dtype=dtype)


def broken(monkeypatch, policy, change):
    """Changes the arguments of every forward with a mask."""
    trunk = trunk_of(policy.model)
    forward = trunk.forward

    def call(**inputs):
        return forward(**(change(inputs) if "attention_mask" in inputs else inputs))

    monkeypatch.setattr(trunk, "forward", call)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda i: i | {"position_ids": i["position_ids"] + 5 * (i["input_ids"] > 90)}, "padding"),
        (lambda i: i | {"attention_mask": torch.ones_like(i["attention_mask"])}, "padding"),
        (
            lambda i: i | {"position_ids": i["position_ids"] + 5 * (i["input_ids"].shape[1] == 1)},
            "cache",
        ),
    ],
    ids=["positions", "mask", "decoding"],
)
def test_wrong_forwards_are_refused(checkpoint, monkeypatch, dtype, change, fault):
    policy = build(checkpoint("llama"), dtype=dtype)
    broken(monkeypatch, policy, change)
    with pytest.raises(ConfigError, match=f"model.name_or_path=x: .*type llama.*{fault}"):
        probe.check_forwards(policy, "x")


def unread(inputs):
    return inputs | {"attention_mask": torch.zeros_like(inputs["attention_mask"])}


def refused(inputs):
    raise ValueError("a mask of two dimensions is needed")


@pytest.mark.parametrize("change", [unread, refused])
def test_a_model_that_does_not_read_the_mask_of_a_tree_is_not_packed(
    checkpoint, monkeypatch, change
):
    policy = build(checkpoint("llama"))
    assert policy.packs_prefixes

    def in_trees(inputs):
        mask = inputs["attention_mask"]  # None while prompts are shared
        return change(inputs) if mask is not None and mask.ndim == 4 else inputs

    broken(monkeypatch, policy, in_trees)
    shares_prefixes, packs_prefixes = probe.check_forwards(policy, "x")
    assert shares_prefixes
    assert not packs_prefixes


def test_weights_that_are_not_finite_are_refused(checkpoint):
    policy = build(checkpoint("llama"))
    with torch.no_grad():
        policy.lm_head.weight[5, 3] = torch.nan
    with pytest.raises(ConfigError, match="model.name_or_path=x: .*not finite"):
        probe.check_forwards(policy, "x")


def test_an_error_of_a_forward_is_the_reason(checkpoint, monkeypatch):
    policy = build(checkpoint("llama"))

    def fail(*_, **__):
        raise TypeError("unexpected keyword argument 'past_key_values'")

    monkeypatch.setattr(policy.model, "forward", fail)
    with pytest.raises(ConfigError, match="model.name_or_path=x: .*'past_key_values'"):
        probe.check_forwards(policy, "x")
