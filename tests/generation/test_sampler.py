import pytest
import torch

from etpo.generation import sampler
from etpo.generation.sampler import decode_actions, generate, inverse_cdf
from etpo.models.causal_lm import trunk_of
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

from ..by_token import hidden_states, log_probs

OBSERVATIONS = [
    {"instruction": "", "prefix": p, "suffix": ""} for p in ("go", "a longer prompt", "x")
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("min_p", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "qwen", "starcoder"])
def test_sampled_hidden_states_are_those_of_the_training_forward(checkpoint, family, min_p):
    policy = LanguageModelPolicy(
        str(checkpoint(family)), CompletionTemplate(), temperature=0.7, min_p=min_p
    )
    prompts = policy.encode(OBSERVATIONS)
    taken = generate(policy, prompts, 12, generator())
    hidden = hidden_states(policy, prompts.ids, prompts.mask, taken.ids)
    torch.testing.assert_close(
        taken.hidden_states, hidden * taken.mask.unsqueeze(-1), rtol=1e-3, atol=1e-4
    )


def sample_plainly(policy, prompts, max_new_tokens, draws):
    """Ids of every action, alone and without a cache: all is read for every token."""
    noise = [torch.rand(len(prompts.ids), dtype=torch.float64, generator=draws) for _ in range(99)]
    rows = []
    for row, (prompt, mask) in enumerate(zip(prompts.ids, prompts.mask, strict=True)):
        text, taken = prompt[mask][None], []
        while len(taken) < max_new_tokens and not set(taken) & set(policy.stop_ids):
            logits = policy.model(input_ids=text).logits[0, -1, : policy.vocabulary_size]
            p = (logits / policy.temperature).softmax(-1)
            cdf = p.where(p >= policy.min_p * p.max(), 0.0).double().cumsum(0)
            taken.append(int((cdf / cdf[-1] <= noise[len(taken)][row]).sum()))
            text = torch.cat([text, torch.tensor([[taken[-1]]])], dim=1)
        rows.append(taken)
    return rows


@torch.no_grad()
@pytest.mark.parametrize("min_p", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "qwen", "starcoder"])
def test_tokens_are_those_of_plain_decoding_with_the_same_noise(checkpoint, family, min_p):
    policy = LanguageModelPolicy(
        str(checkpoint(family)), CompletionTemplate(), temperature=0.7, min_p=min_p
    )
    policy.stop_ids = list(range(3, 40))  # the actions end one by one
    prompts = policy.encode(OBSERVATIONS * 6)
    taken = generate(policy, prompts, 24, generator())
    expected = sample_plainly(policy, prompts, 24, generator())
    lengths = taken.mask.sum(1)
    assert len(lengths.unique()) > 4
    for row, ids in enumerate(expected):
        assert taken.ids[row, : lengths[row]].tolist() == ids


def test_the_model_no_longer_reads_actions_that_have_ended(checkpoint, monkeypatch):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    policy.stop_ids = list(range(3, 40))
    read = []
    trunk = trunk_of(policy.model)
    forward = trunk.forward

    def count(*args, input_ids, **kwargs):
        read.append(len(input_ids))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(trunk, "forward", count)
    taken = generate(policy, policy.encode(OBSERVATIONS * 10), 24, generator())
    running = taken.mask.sum(0)[1:].tolist()  # before each token but the first, which prompts give
    assert len(read) == len(taken.mask[0])
    assert all(now <= size < 2 * max(now, 1) for now, size in zip(running, read[1:], strict=True))


def test_inverse_cdf_gives_each_token_its_share_of_the_noise():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    noise = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = inverse_cdf(p.log().expand(1000, -1), noise)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 250, 0, 500, 250, 0]
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(p.log().expand(2, -1), ends).tolist() == [1, 4]


def test_an_action_ends_with_its_first_stop_token(checkpoint):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    policy.stop_ids = list(range(3, 60))
    taken = generate(policy, policy.encode(OBSERVATIONS * 10), 6, generator())
    lengths = taken.mask.sum(1)
    assert 0 < taken.length_limited.sum() < len(lengths)
    for row, (ids, mask, length) in enumerate(zip(taken.ids, taken.mask, lengths, strict=True)):
        assert mask[:length].all()
        stopped = torch.isin(ids[:length], torch.tensor(policy.stop_ids))
        assert not stopped[:-1].any()
        assert stopped[-1] or length == 6
        assert taken.length_limited[row] == (not stopped[-1])
    assert lengths.unique().numel() > 1


def test_an_action_ends_where_a_stop_string_is_complete(checkpoint):
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    policy = LanguageModelPolicy(
        str(checkpoint("llama")), CompletionTemplate(), stop_strings=letters
    )
    taken = generate(policy, policy.encode(OBSERVATIONS * 10), 40, generator())
    for ids, mask in zip(taken.ids, taken.mask, strict=True):
        text = policy.tokenizer.decode(ids[mask], skip_special_tokens=True)
        assert not set(text[:-1]) & set(letters)
        assert not set(policy.decode(ids[mask].tolist())) & set(letters)


def test_a_stop_string_is_looked_for_after_what_the_prompt_left_to_the_action(
    checkpoint, monkeypatch
):
    policy = LanguageModelPolicy(
        str(checkpoint("llama")), CompletionTemplate(), stop_strings=["\n"]
    )
    action = policy.tokenizer("\nab\ncd", add_special_tokens=False)["input_ids"]
    steps = iter(action)
    monkeypatch.setattr(sampler, "inverse_cdf", lambda log_p, noise: torch.tensor([next(steps)]))
    prompts = policy.encode(OBSERVATIONS[:1])._replace(rests=("\n",))
    taken = generate(policy, prompts, 10, generator())
    assert taken.ids[0].tolist() == action[:4]
    assert decode_actions(policy, prompts, taken) == ["ab"]


def test_sampling_repeats_with_its_generator_and_greedy_needs_none(checkpoint):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    prompts = policy.encode(OBSERVATIONS)
    first, second = (generate(policy, prompts, 8, generator(5)) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.hidden_states, second.hidden_states)
    assert not torch.equal(first.ids, generate(policy, prompts, 8, generator(6)).ids)
    greedy = generate(policy, prompts, 1, None)
    expected = log_probs(policy, prompts.ids, prompts.mask, greedy.ids).argmax(-1)
    assert torch.equal(greedy.ids, expected)


@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_samples_follow_the_policy(checkpoint, min_p):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate(), min_p=min_p)
    prompts = policy.encode(OBSERVATIONS[:1] * 20000)
    taken = generate(policy, prompts, 1, generator())
    frequency = torch.bincount(taken.ids[:, 0], minlength=policy.vocabulary_size) / 20000
    one = policy.encode(OBSERVATIONS[:1])
    probability = log_probs(policy, one.ids, one.mask, taken.ids[:1]).exp()[0, 0]
    # five standard deviations of a frequency over 20000 draws
    bound = 5 * (probability * (1 - probability) / 20000).sqrt() + 1e-4
    assert ((frequency - probability).abs() < bound).all()
