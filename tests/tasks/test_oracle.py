"""The distance to the optimum against a plain forward and the action-level solver."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from etpo.algorithms.etpo import ETPO, ETPOSettings
from etpo.algorithms.returns import kl_divergence
from etpo.models.critics import HeadCritic
from etpo.models.prompting import CompletionTemplate
from etpo_tasks.char_lm import build_char_lm
from etpo_tasks.oracle import OracleDistance, prefix_tokens, tables
from etpo_tasks.token_mdp_env import TokenMDPEnv, action_texts, random_mdp

from ..token_mdp_oracle import TokenMDP

BETA, GAMMA = 0.5, 0.8


@pytest.fixture
def environment():
    return TokenMDPEnv(mdp=random_mdp(seed=0, num_states=4, vocabulary_size=4, length=3))


@pytest.fixture
def module(tmp_path):
    """Return ETPO with a critic that is 0.3 everywhere."""
    policy = build_char_lm(
        str(tmp_path / "model"), CompletionTemplate(), vocabulary_size=4, init_seed=0
    )
    critic = HeadCritic(policy, hidden_size=8)
    torch.nn.init.constant_(critic.head.value.bias, 0.3)
    return ETPO(policy, critic, ETPOSettings(beta=BETA, gamma=GAMMA, pessimism_threshold=0.0))


def move(policy):
    """Change the policy, so that it differs from the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def test_tables_hold_the_models_outputs_at_every_prefix(environment, module):
    move(module.policy.model)
    log_pi, log_ref, value = tables(environment, module)
    mdp = environment.mdp
    assert log_pi.shape == log_ref.shape == (4, *mdp.tree.child.shape)
    for state, observation in enumerate(environment.observations):
        prompt = module.policy.tokenizer(observation["prefix"])["input_ids"]
        for prefix, written in enumerate(prefix_tokens(mdp)):
            ids = torch.tensor([[*prompt, *written]])
            for model, table in (
                (module.policy.model, log_pi),
                (module.policy.reference_model, log_ref),
            ):
                plain = model(ids).logits[0, -1].log_softmax(-1)
                torch.testing.assert_close(table[state, prefix].float(), plain)
    kl = kl_divergence(log_pi, log_ref)[:, 0]
    torch.testing.assert_close(value, 0.3 - BETA * kl)


@torch.no_grad()
def test_tables_of_choices_are_restricted_softmaxes(module):
    """V is that of the first step: single letters with which all choices begin are forced."""
    move(module.policy.model)
    mdp = random_mdp(seed=0, num_states=4, vocabulary_size=4, length=3)
    environment, prefixes = TokenMDPEnv(mdp=mdp, num_choices=4), prefix_tokens(mdp)
    environment.observations[0]["choices"] = ("abc", "ab", "aba")
    environment.observations[1]["choices"] = ("ca",)
    log_pi, log_ref, value = tables(environment, module)
    policy, texts = module.policy, action_texts(mdp)
    models = policy.model, policy.reference_model
    for state, observation in enumerate(environment.observations):
        chosen = [mdp.tree.paths[texts.index(text)] for text in observation["choices"]]
        total = 0.0
        for path in chosen:
            log_p = 0.0
            for number, (prefix, token) in enumerate(path):
                before = path[:number]
                options = sorted({p[number][1] for p in chosen if p[:number] == before})
                prompt = policy.tokenizer(observation["prefix"])["input_ids"]
                ids = torch.tensor([[*prompt, *prefixes[prefix]]])
                for model, table in zip(models, (log_pi, log_ref), strict=True):
                    plain = model(ids).logits[0, -1, options].log_softmax(-1).double()
                    found = table[state, prefix, options]
                    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
                log_p += log_pi[state, prefix, token]
            total += log_p.exp()
        assert total == pytest.approx(1, abs=1e-6)
    kl = kl_divergence(log_pi, log_ref)
    first = [prefixes.index(p) for p in ([0, 1], [], [], [])]  # of "abc", "ab" and "aba": "ab"
    torch.testing.assert_close(value, 0.3 - BETA * kl[range(4), first], rtol=1e-4, atol=1e-5)


def test_prefixes_spell_the_paths_of_the_actions(environment):
    written = prefix_tokens(environment.mdp)
    for path in environment.mdp.tree.paths:
        for number, (prefix, _) in enumerate(path):
            assert written[prefix] == [token for _, token in path[:number]]


def test_numbers_agree_with_the_optimum_over_whole_actions(environment, module, monkeypatch):
    move(module.policy.model)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(environment=environment))
    numbers = {}
    monkeypatch.setattr(module, "log", numbers.__setitem__)
    OracleDistance().on_validation_epoch_end(trainer, module)
    mdp = TokenMDP.of(replace(environment.mdp, gamma=GAMMA))
    with torch.no_grad():
        log_pi, log_ref, value = tables(environment, module)
    log_optimum, optimum = mdp.solve_actions(log_ref, BETA)
    kl = kl_divergence(mdp.action_log_probs(log_pi), log_optimum)
    logged = {name: number.item() for name, number in numbers.items()}
    assert logged["oracle/kl_max"] == pytest.approx(kl.max().item(), rel=1e-5)
    assert logged["oracle/value_error"] == pytest.approx((value - optimum).abs().max().item())
    assert logged["oracle/value"] == pytest.approx((mdp.start @ optimum).item())
    # the regret of a soft policy is beta times its KL, summed over the states that it visits
    regret = logged["oracle/value"] - mdp.regularized_return(log_pi, log_ref, BETA).item()
    visits = mdp.visitation(log_pi)[:, 0].sum().item()
    assert BETA * visits * logged["oracle/kl"] == pytest.approx(regret, rel=1e-5)
