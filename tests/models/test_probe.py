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
