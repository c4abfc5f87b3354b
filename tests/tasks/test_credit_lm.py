"""The language model of the credit suite: its prompts, and a reference that is exactly uniform."""

import torch

from etpo.generation.sampler import decode_actions, generate
from etpo.models.prompting import CompletionTemplate
from etpo_tasks.credit_lm import build_credit_lm
from etpo_tasks.credit_suite import CreditSuiteEnv


def test_actions_are_uniform_over_the_letters_and_never_end_early(tmp_path):
    policy = build_credit_lm(str(tmp_path / "model"), CompletionTemplate(), init_seed=0)
    dials = {"length": 64, "turns": 32, "cues": 4, "noise_bits": 16, "distractor": 0.1}
    environment = CreditSuiteEnv(num_envs=40, **dials)
    observations, _ = environment.reset(seed=0)
    prompts = policy.encode(observations)
    assert prompts.ids.shape[1] == 1 + 6 + 16  # the start, turn, status, cue and earnings, bits
    generator = torch.Generator().manual_seed(0)
    sample = generate(policy, prompts, 64, generator, environment.grammar)
    texts = decode_actions(policy, prompts, sample)
    assert environment.step(texts)[4]["error"].tolist() == [None] * 40
    counts = torch.tensor(["".join(texts).count(letter) for letter in "abcd"]) / (40 * 64)
    assert ((counts - 0.25).abs() < 0.04).all()
    hidden = sample.hidden_states.flatten(0, 1)
    for reference in (False, True):
        logits = policy.logits(hidden, reference=reference)
        assert (logits == 0).all()
