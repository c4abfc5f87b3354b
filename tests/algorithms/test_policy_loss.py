"""ETPO's policy loss, whose terms are summed by prefix and taken token, against single tokens."""

import copy

import pytest
import torch

from etpo.algorithms import etpo
from etpo.models.critics import TrunkCritic
from etpo.models.token_columns import ALL_TOKENS

from .rooms import SPACES, Rooms, allowed_of

BETA, ETA, PENALTY, MIN_P, RARE = 0.3, 0.2, 0.7, 0.3, 0.4
CLIP = {"ratio": 0.1, "probability": 0.03}


def row_losses(models, critic, settings, prompt, action, steps, allowed, advantages):
    """Return losses, moves and KL(pi_old || pi) of an action's steps [k], written out.

    A move is the change of the taken token's probability, 1 or -1 at the clip.

    models: the policy, the one that sampled and the reference; forwards of transformers alone.
    steps: bool [l] of the action's tokens. allowed: bool [k, V]. advantages: [k].
    """
    ids, first = torch.cat([prompt, action[:-1]])[None], len(prompt) - 1
    logits = [model(ids).logits[0, first:, : allowed.shape[1]][steps] for model in models]
    p_new, p_old, p_ref = (each.where(allowed, -torch.inf).softmax(-1) for each in logits)
    support = (allowed & (p_old >= MIN_P * p_old.amax(-1, keepdim=True))).detach()
    mass = (p_new * support).sum(-1)
    old = torch.where(support, p_old, 0.0)
    pi, old = torch.where(support, p_new, 0.0) / mass[:, None], old / old.sum(-1, keepdim=True)
    log_pi, log_old, log_ref = (torch.where(support, p, 1.0).log() for p in (pi, old, p_ref))
    value, scores = critic.head(critic.trunk(ids).last_hidden_state[0, first:][steps])
    q = value[:, None] + scores - (old * scores).sum(-1, keepdim=True)
    q = torch.where(old < RARE, torch.minimum(q, value[:, None]), q).detach()
    cost = (BETA * (log_pi - log_ref) + ETA * (log_pi - log_old) - q).detach()
    gain = (old * cost).sum(-1, keepdim=True) - cost
    before = torch.where(support, old, 1.0).detach()
    each = torch.where(support, pi / before, 1.0)
    clip = CLIP[settings.clip_unit] / (before if settings.clip_unit == "probability" else 1.0)
    clip = torch.as_tensor(clip).expand_as(each)
    exact = torch.minimum(each * gain, each.clamp(1 - clip, 1 + clip) * gain)
    taken = torch.arange(int(steps.sum())), action[steps]
    ratio, clip = pi[taken] / old[taken].detach(), clip[taken]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    penalty = settings.truncation_kl_coef
    losses = -(old.detach() * exact).sum(-1) - penalty * mass.log() - surrogate
    return losses, (ratio.detach() - 1) / clip, (old * (log_old - log_pi)).sum(-1).detach()


@pytest.fixture
def shared(build_etpo, letter_env, fit):
    """shared(...): a module that left pi_old, a batch of shared prefixes, and pi_old."""

    def make(env=None, unit="probability", **settings):
        torch.manual_seed(0)
        module = build_etpo(
            TrunkCritic,
            **{"beta": BETA, "eta": ETA, "clip": CLIP[unit], "clip_unit": unit}
            | {"truncation_kl_coef": PENALTY}
            | {"pessimism_threshold": RARE, "max_kl": None, "min_p": MIN_P}
            | settings,
        )
        sizes = {"minibatch_size": 32, "max_new_tokens": 5 if env is None else 9}
        data = fit(module, env or letter_env(12, length=1), 2, **sizes)
        _, batch = data.collect_targets()
        generator = torch.Generator().manual_seed(0)
        batch = batch._replace(
            advantages=torch.randn(batch.advantages.shape, generator=generator),
            weights=torch.rand(batch.weights.shape, generator=generator),
        )
        old = copy.deepcopy(module.policy.model)
        with torch.no_grad():
            for parameter in module.policy.trainable_parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        module.scale = 1.7
        return module, batch, old

    return make


def written_out(module, batch, old, allowed):
    """Return loss, moves [B, L] and mean KL(pi_old || pi) of a batch, by `row_losses`."""
    models = module.policy.model, old, module.policy.reference_model
    total, moves, kl = 0.0, torch.zeros_like(batch.advantages), 0.0
    for row, mask in enumerate(batch.step_mask):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        steps = mask[: mask.nonzero().max() + 1]
        tokens = prompt, batch.action_ids[row, : len(steps)], steps
        at_steps = allowed[row, mask], batch.advantages[row, mask]
        losses, moves[row, mask], divergence = row_losses(
            models, module.target_critic, module.settings, *tokens, *at_steps
        )
        total = total + batch.weights[row] * losses.sum()
        kl += float(divergence.sum())
    return module.scale * total / len(batch.weights), moves, kl / len(batch.weights)


def assert_equal(module, batch, expected, moves, kl, assert_same_gradient):
    """Loss, gradient and metrics of the policy loss are those of `written_out`."""
    loss, metrics = module.policy_loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradient(loss, expected, module.policy.trainable_parameters(), 1e-3, 1e-5)
    clipped = (moves.abs() > 1)[batch.step_mask].float().mean()
    assert metrics["train/clip_fraction"][0] == pytest.approx(float(clipped), abs=1e-6)
    assert metrics["train/clip_fraction"][1] == int(batch.step_mask.sum())
    assert metrics["train/kl_to_old"][0] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize("unit", CLIP)
def test_sums_over_shared_prefixes_equal_the_loss_of_single_tokens(
    unit, chunk, shared, assert_same_gradient
):
    module, batch, old = shared(unit=unit, logits_chunk_size=chunk)
    size = module.policy.vocabulary_size
    allowed = torch.ones(*batch.action_ids.shape, size, dtype=torch.bool)
    expected, moves, kl = written_out(module, batch, old, allowed)

    # one taken token of one prefix has advantages of both signs, and all ways to be clipped occur
    valid, tree = batch.step_mask, batch.tree
    assert len(tree.node) < valid.sum() / 2
    assert tree.taken.shape[1] > 2
    signs = [tree.sum_to_taken((side * batch.advantages > 0).float()) > 0 for side in (1, -1)]
    both = tree.of_taken((signs[0] & signs[1]).float()).bool()
    for outside in (moves > 1, moves < -1):
        for side in (1, -1):
            assert (outside & both & (side * batch.advantages > 0))[valid].sum() > 5
    assert_equal(module, batch, expected, moves, kl, assert_same_gradient)


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize(("spaces", "penalty"), [(SPACES, PENALTY), (SPACES[1:], 0.0)])
def test_the_loss_is_over_the_allowed_tokens_of_the_steps(
    spaces, penalty, chunk, shared, assert_same_gradient
):
    """All or some observations have choices; the penalty's mass is of the allowed tokens."""
    env, settings = Rooms(8, spaces), {"truncation_kl_coef": penalty, "logits_chunk_size": chunk}
    module, batch, old = shared(env, **settings)
    allowed = allowed_of(module.policy, batch, spaces)
    inside = set(allowed[batch.step_mask].sum(1).tolist())
    assert inside == {1, 2, 3} | ({module.policy.vocabulary_size} if None in spaces else set())
    expected, moves, kl = written_out(module, batch, old, allowed)
    assert_equal(module, batch, expected, moves, kl, assert_same_gradient)


def test_a_loss_over_tokens_that_are_not_allowed_is_another(shared, monkeypatch):
    module, batch, old = shared(Rooms(8))
    expected, _, _ = written_out(module, batch, old, allowed_of(module.policy, batch))
    monkeypatch.setattr(etpo, "loss_columns", lambda *args, **options: ALL_TOKENS)
    loss, _ = module.policy_loss(batch)
    assert not (loss - expected).abs() <= 1e-2


def test_advantages_of_both_signs_are_summed_separately(shared):
    """One sum of all would clip neither or both, so that the loss differs."""
    module, batch, _ = shared()
    loss, _ = module.policy_loss(batch)
    tree, weights = batch.tree, batch.weights[:, None] * batch.step_mask
    mean = tree.sum_to_taken(weights * batch.advantages) / tree.sum_to_taken(weights)
    joined, _ = module.policy_loss(batch._replace(advantages=tree.of_taken(mean.nan_to_num())))
    assert (loss - joined).abs() > 1e-2
