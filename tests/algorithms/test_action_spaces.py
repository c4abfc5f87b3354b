"""Every algorithm where some observations have choices, against plain forwards."""

import pytest
import torch
from lightning import Callback

from etpo.algorithms.no_update import NoUpdate
from etpo.models.critics import HeadCritic
from etpo.models.token_columns import pack

from .. import by_token
from ..by_token import gather_tokens
from ..restricted import next_tokens, restricted, tokens_of
from .conftest import ALGORITHMS
from .rooms import SPACES, Rooms, allowed_of

BUDGET = {"max_new_tokens": 9, "update_epochs": 2, "minibatch_size": 16}


class First(Callback):
    """Rollout and training batch of the last iteration, before its first update."""

    @torch.no_grad()
    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 0:
            self.rollout = trainer.datamodule.rollout
            self.batch = module.compute_targets(self.rollout)
            self.check(module)

    def check(self, module):
        pass


class Recomputed(First):
    """Compares the batch's log-probabilities with restricted softmaxes of plain forwards."""

    def check(self, module):
        policy, actions, batch = module.policy, self.rollout.actions, self.batch
        for row, place in actions.action_mask.nonzero().tolist():
            found = [x[row, place] for x in (batch.old_log_probs, batch.ref_log_probs)]
            if not actions.step_mask[row, place]:
                assert not any(found)
                continue
            prompt = actions.prompt_ids[row][actions.prompt_mask[row]].tolist()
            ids = actions.action_ids[row].tolist()
            choices = SPACES[int(policy.tokenizer.decode(prompt)[0])]
            options = choices and next_tokens(policy, choices, ids[:place])
            read = prompt + ids[:place]
            p = restricted(policy, read, options)[ids[place]]
            ref = restricted(policy, read, options, policy.reference_model)[ids[place]]
            torch.testing.assert_close(found[0], p.log().float(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found[1], ref.log().float(), rtol=1e-3, atol=1e-4)
        assert not batch.old_log_probs[~batch.step_mask].any()
        assert not batch.advantages.isnan().any()


@pytest.fixture
def built(build_algorithm, make_policy):
    """built(name, ...): an algorithm with a scalar or dueling head."""

    def make(name, min_p=0.0, **changes):
        torch.manual_seed(0)
        return build_algorithm(name, make_policy(min_p=min_p), HeadCritic, max_kl=None, **changes)

    return make


@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_recorded_probabilities_are_those_of_the_restricted_softmax(name, min_p, built, fit):
    module, watch = built(name, min_p), Recomputed()
    before = [p.clone() for p in module.policy.trainable_parameters()]
    iterations = 4 if name == "archer" else 2  # its critic learns first
    fit(module, Rooms(4), iterations, [watch], **BUDGET)
    actions, batch = watch.rollout.actions, watch.batch
    assert (actions.step == 0).any()
    assert actions.truncated.sum() == 4
    forced = (actions.action_mask & ~actions.step_mask).sum(1)
    assert {0, 4} <= set(forced.tolist())
    moved = (batch.old_log_probs - batch.ref_log_probs)[batch.step_mask]
    assert moved.abs().max() > 1e-2  # the policy is no longer the reference
    pairs = zip(before, module.policy.trainable_parameters(), strict=True)
    assert max((old - new).abs().max() for old, new in pairs) > 1e-3
    metrics = module.trainer.callback_metrics
    assert all(value.isfinite() for value in metrics.values())


@torch.no_grad()
def test_a_frozen_model_reports_the_kl_of_its_truncation(make_policy, fit):
    module = NoUpdate.from_config(make_policy(min_p=0.3))
    data = fit(module, Rooms(4), 1, **BUDGET)
    actions, policy, kl = data.rollout.actions, module.policy, 0.0
    allowed = allowed_of(policy, actions)
    for row, place in actions.step_mask.nonzero().tolist():
        prompt = actions.prompt_ids[row][actions.prompt_mask[row]].tolist()
        options = allowed[row, place].nonzero()[:, 0].tolist()
        inputs = policy, prompt + actions.action_ids[row, :place].tolist(), options
        p, whole = restricted(*inputs), restricted(*inputs, policy.model)
        kl -= float(whole[p > 0].sum().log())
    expected = kl / len(actions.rewards)
    assert expected > 0.01
    assert module.iteration_metrics["rollout/kl_to_reference"] == pytest.approx(expected, rel=1e-3)


def first_step(policy, observation):
    """Return prompt and forced tokens of an observation, and the tokens of the first step."""
    prompts, choices = policy.encode([observation]), observation.get("choices")
    prompt, ids = prompts.ids[0].tolist(), []
    if choices is None or len(choices) == 1:
        return prompt, choices and {tokens_of(policy, choices[0])[0]}
    while len(options := next_tokens(policy, choices, ids)) == 1:
        ids += options
    return prompt + ids, options


def value_at(module, ids, options, name):
    """Return the value of the critic that makes the targets after tokens `ids`."""
    policy, critic = module.policy, module.target_critic if name != "poad" else module.critic
    inputs = torch.tensor([ids])
    hidden = policy.reference_model(inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    if name == "poad":
        return critic.head(hidden)
    value, scores = critic.head(hidden)
    if name == "archer":
        return value
    p, ref = (restricted(policy, ids, options, m) for m in (policy.model, policy.reference_model))
    q = value + scores - (p * scores).sum()
    kl = torch.where(p > 0, (p / ref).log(), 0.0)
    return (p * (q - module.beta * kl)).sum()


@torch.no_grad()
@pytest.mark.parametrize("name", ["etpo", "poad", "archer"])
def test_a_truncated_action_is_bootstrapped_at_its_next_first_step(name, built, fit):
    """Not at the prompt: tokens that are forced have no value."""
    module, env, values = built(name), Rooms(4), []

    class Bootstrap(First):
        def check(self, module):
            for parameter in module.parameters():  # the critic is not zero, its target neither
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
            module.start_iteration(self.rollout)
            found = module.bootstrap_values(self.rollout)
            actions = self.rollout.actions
            values.append(found[actions.truncated].tolist())
            assert not found[~actions.truncated].any()
            policy = module.policy
            starts = [first_step(policy, observation) for observation in env.last]
            values.append([float(value_at(module, *start, name)) for start in starts])
            prompts = [policy.encode([o]).ids[0].tolist() for o in env.last]
            values.append([float(value_at(module, prompt, None, name)) for prompt in prompts])

    fit(module, env, 1, [Bootstrap()], trainer={"limit_val_batches": 0}, **BUDGET)
    found, expected, at_prompts = values
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(expected, at_prompts, strict=True)) > 1e-2


@torch.no_grad()
def counted(policy, rollout):
    """Return the rollout with forced tokens as steps: they are allowed alone."""
    actions = rollout.actions
    forced = actions.action_mask & ~actions.step_mask
    one = torch.nn.functional.one_hot(actions.action_ids[forced], policy.vocabulary_size).bool()
    sets = [x.clone() for x in (actions.allowed, actions.support)]
    for each in sets:
        each[forced] = pack(one, None, policy.vocabulary_size)
    hidden = by_token.hidden_states(policy, *actions[:3])
    return rollout._replace(
        actions=actions._replace(
            step_mask=actions.action_mask, hidden_states=hidden, allowed=sets[0], support=sets[1]
        )
    )


@pytest.fixture
def both(built, fit):
    """both(name): a module, and its batches with the steps and with all tokens as steps."""

    def make(name):
        module = built(name)
        data = fit(module, Rooms(4), 2, **BUDGET)
        if module.critic is not None:
            torch.nn.init.normal_(module.critic.head.value.weight, std=0.3)
        data.collect_targets()
        rollouts = data.rollout, counted(module.policy, data.rollout)
        return module, *(module.compute_targets(rollout) for rollout in rollouts)

    return make


def gradient(loss, parameters):
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def test_grpo_averages_over_the_tokens_that_were_drawn(both):
    module, batch, wrong = both("grpo")
    allowed = allowed_of(module.policy, batch)
    log_pi = gather_tokens(
        by_token.log_probs(module.policy, *batch[:3], allowed=allowed), batch.action_ids
    )
    log_ratio = batch.ref_log_probs - log_pi
    tokens = -batch.advantages * log_pi + module.beta * (log_ratio.exp() - log_ratio - 1)
    steps = batch.step_mask
    expected = (torch.where(steps, tokens, 0.0).sum(1) / steps.sum(1)).mean()
    parameters = module.policy.trainable_parameters()
    expected = gradient(expected, parameters)
    found, other = (gradient(module.policy_loss(b)[0], parameters) for b in (batch, wrong))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert (other - expected).norm() > 0.1 * expected.norm()


@torch.no_grad()
def test_forced_tokens_are_no_targets_of_the_critic(both):
    module, batch, wrong = both("poad")
    values = by_token.critic_outputs(module.critic, module.policy, *batch[:3])
    errors = (values - batch.returns)[batch.step_mask].abs()
    losses = []
    for each in (batch, wrong):
        module.mean_length = float(each.step_mask.sum(1).float().mean())
        losses.append(module.critic_loss(each)[0].item())
    loss, other = losses
    expected = torch.where(errors < 1, errors.square() / 2, errors - 0.5).mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert abs(other - loss) > 0.01 * loss
    # nor do they have a value that others learn from
    assert (wrong.returns - batch.returns)[batch.step_mask].abs().max() > 1e-2
