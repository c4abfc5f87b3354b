import pytest
import torch

from etpo.models.backbone import Backbone
from etpo.models.prompting import CompletionTemplate
from etpo.rollout.sampler import sample

OBSERVATIONS = [
    {"instruction": "", "prefix": p, "suffix": ""} for p in ("go", "a longer prompt", "x")
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("min_p", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "qwen", "starcoder"])
def test_recorded_log_probs_equal_those_of_the_training_forward(checkpoint, family, min_p):
    backbone = Backbone(str(checkpoint(family)), CompletionTemplate(), temperature=0.7, min_p=min_p)
    prompts = backbone.encode(OBSERVATIONS)
    taken = sample(backbone, prompts, 12, generator())
    log_pi = backbone(prompts.ids, prompts.mask, taken.ids).log_probs
    again = log_pi.gather(-1, taken.ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(taken.log_probs[taken.mask], again[taken.mask], rtol=0, atol=1e-4)


def test_an_action_ends_with_its_first_stop_token(checkpoint):
    backbone = Backbone(str(checkpoint("llama")), CompletionTemplate())
    backbone.stop_ids = list(range(3, 60))
    taken = sample(backbone, backbone.encode(OBSERVATIONS * 10), 16, generator())
    lengths = taken.mask.sum(1)
    for ids, mask, length in zip(taken.ids, taken.mask, lengths, strict=True):
        assert mask[:length].all()
        stopped = torch.isin(ids[:length], torch.tensor(backbone.stop_ids))
        assert not stopped[:-1].any()
        assert stopped[-1] or length == taken.ids.shape[1]
    assert lengths.unique().numel() > 1


def test_an_action_ends_where_a_stop_string_is_complete(checkpoint):
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    backbone = Backbone(str(checkpoint("llama")), CompletionTemplate(), stop_strings=letters)
    taken = sample(backbone, backbone.encode(OBSERVATIONS * 10), 40, generator())
    for ids, mask in zip(taken.ids, taken.mask, strict=True):
        text = backbone.tokenizer.decode(ids[mask], skip_special_tokens=True)
        assert not set(text[:-1]) & set(letters)
        assert not set(backbone.decode(ids[mask].tolist())) & set(letters)


def test_sampling_repeats_with_its_generator_and_greedy_needs_none(checkpoint):
    backbone = Backbone(str(checkpoint("llama")), CompletionTemplate())
    prompts = backbone.encode(OBSERVATIONS)
    first, second = (sample(backbone, prompts, 8, generator(5)) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.log_probs, second.log_probs)
    assert not torch.equal(first.ids, sample(backbone, prompts, 8, generator(6)).ids)
    greedy = sample(backbone, prompts, 1, None)
    expected = backbone(prompts.ids, prompts.mask, greedy.ids).log_probs.argmax(-1)
    assert torch.equal(greedy.ids, expected)


@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_samples_follow_the_policy(checkpoint, min_p):
    backbone = Backbone(str(checkpoint("llama")), CompletionTemplate(), min_p=min_p)
    prompts = backbone.encode(OBSERVATIONS[:1] * 20000)
    taken = sample(backbone, prompts, 1, generator())
    frequency = torch.bincount(taken.ids[:, 0], minlength=backbone.vocabulary_size) / 20000
    one = backbone.encode(OBSERVATIONS[:1])
    probability = backbone(one.ids, one.mask, taken.ids[:1]).log_probs.exp()[0, 0]
    # five standard deviations of a frequency over 20000 draws
    bound = 5 * (probability * (1 - probability) / 20000).sqrt() + 1e-4
    assert ((frequency - probability).abs() < bound).all()
