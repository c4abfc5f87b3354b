"""Numbers of `credit.jsonl` against plain loops over training batches and distributions."""

import json
import math

import pytest
import torch
from lightning import Callback

from etpo.algorithms.etpo import ETPO
from etpo.algorithms.no_update import NoUpdate, NoUpdateSettings
from etpo.callbacks.credit import TokenCredit
from etpo.errors import ConfigError
from etpo.models.critics import TrunkCritic

from .. import by_token
from ..by_token import unpadded, whole_columns
from .rooms import SPACES, Rooms, allowed_of

ACTIONS = 10  # of 2 environments with 8 each: all of the first and two of the second


class Kept(Callback):
    """Per iteration: rollout, training batch, distributions of each row alone, beta and Q."""

    def __init__(self):
        self.seen = []

    @torch.no_grad()
    def on_train_batch_start(self, trainer, module, batch, index):
        if index > 0:
            return
        rollout = trainer.datamodule.rollout
        alone = []
        for row in range(len(rollout.records)):
            alone.append(distributions(module, *unpadded(rollout.actions, row)))
        batch, q = module.compute_targets(rollout), None
        if isinstance(module, ETPO):
            columns = whole_columns(module.policy, batch.states)
            q = batch.tree.of_tokens(
                module.old_distributions(batch.states, columns, batch.tree.fold)[2]
            )
        self.seen.append((rollout, batch, alone, module.beta, q))


def distributions(module, *inputs):
    """log pi and log pi_ref [l, V] of one action."""
    return tuple(by_token.log_probs(module.policy, *inputs, reference=r)[0] for r in (False, True))


def rows_of(folder):
    lines = [json.loads(line) for line in (folder / "credit.jsonl").read_text().splitlines()]
    sampled = [line for line in lines if "followed" not in line]
    return sampled, [line for line in lines if "followed" in line]


@pytest.fixture
def recorded(tmp_path, fit, letter_env, paid):
    """recorded(module): lines per iteration, lines of followed actions, and `Kept.seen`."""

    def run(module, iterations=2):
        kept = Kept()
        # rewards that differ, and a failure now and then
        env = paid(letter_env(2), lambda action: sum(map(ord, action)) % 7 / 7)
        credit = TokenCredit(tmp_path, "letters", 1, ACTIONS)
        fit(module, env, iterations, [credit, kept], minibatch_size=16)
        sampled, followed = rows_of(tmp_path)
        assert len(sampled) == iterations * ACTIONS
        parts = [sampled[i * ACTIONS : (i + 1) * ACTIONS] for i in range(iterations)]
        return parts, followed, kept.seen

    return run


def near(value):
    return pytest.approx(value, rel=2e-4, abs=2e-5)


def assert_policy_numbers(line, log_pi, log_ref, ids):
    """Probability, log-ratio, entropy, KL and alternatives of one action."""
    for place, token in enumerate(ids):
        p, ref = log_pi[place].exp().tolist(), log_ref[place].tolist()
        likely = [w for w in range(len(p)) if p[w] > 0]
        log_p = log_pi[place].tolist()
        assert line["probability"][place] == near(p[token])
        assert line["log_ratio"][place] == near(log_p[token] - ref[token])
        assert line["entropy"][place] == near(-sum(p[w] * math.log(p[w]) for w in likely))
        assert line["kl"][place] == near(sum(p[w] * (log_p[w] - ref[w]) for w in likely))
        others = sorted((p[w] for w in likely if w != token), reverse=True)[:5]
        assert [cells[1] for cells in line["alternatives"][place]] == near(others)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_p": 0.02, "pessimism_threshold": 1.0, "critic": TrunkCritic},
        {"doubly_robust": False},
    ],
)
def test_etpo(recorded, build_etpo, settings):
    module = build_etpo(**settings)
    parts, _, seen = recorded(module)
    some_q = False
    for lines, (rollout, batch, alone, beta, q) in zip(parts, seen, strict=True):
        rows = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3]
        for line, row in zip(lines, rows, strict=True):
            record = rollout.records[row]
            for name in ("env", "attempt", "prompt", "reward", "error"):
                assert line[name] == getattr(record, name)
            assert "".join(line["text"]) == record.action
            ids = rollout.actions.action_ids[row][rollout.actions.action_mask[row]].tolist()
            assert len(line["text"]) == len(ids)
            log_pi, log_ref = alone[row]
            assert_policy_numbers(line, log_pi, log_ref, ids)
            for place, token in enumerate(ids):
                p = log_pi[place].exp().tolist()
                cost = [beta * (a - b) for a, b in zip(log_pi[place], log_ref[place], strict=True)]
                own_q = q[row, place].tolist()
                # V = E_pi[Q - beta log(pi/pi_ref)]
                value = sum(p[w] * (own_q[w] - float(cost[w])) for w in range(len(p)) if p[w] > 0)
                exact = own_q[token] - float(cost[token]) - value
                sampled = float(batch.advantages[row, place])
                assert line["value"][place] == near(value)
                assert line["q"][place] == near(own_q[token])
                if settings.get("doubly_robust", True):
                    assert line["critic_advantage"][place] == near(exact)
                    assert line["sampled_advantage"][place] == near(sampled)
                    assert line["advantage"][place] == near(exact + sampled)
                else:
                    assert "sampled_advantage" not in line
                    assert line["advantage"][place] == near(exact)
                by_p = sorted(range(len(p)), key=lambda w: -p[w])
                others = [w for w in by_p if p[w] > 0 and w != token][:5]
                other_q = [cells[2] for cells in line["alternatives"][place]]
                assert other_q == near([own_q[w] for w in others])
                some_q = some_q or any(abs(x) > 0.01 for x in other_q)
    assert some_q, "Q is 0"
    assert [line["episode"] for line in parts[0]] == [1, 1, 1, 2, 2, 2, 3, 3, 1, 1]


@pytest.mark.parametrize("algorithm", ["poad", "ppo_kl", "archer", "grpo"])
def test_baselines_show_what_they_have(algorithm, recorded, build_baseline):
    module = build_baseline(algorithm)
    parts, followed, seen = recorded(module)
    ids_of = {
        record.prompt: tuple(unpadded(rollout.actions, row)[0][0].tolist())
        for rollout, *_ in seen
        for row, record in enumerate(rollout.records)
    }
    for lines, (rollout, batch, alone, *_) in zip(parts, seen, strict=True):
        prompts = {ids_of[line["prompt"]] for line in [*lines, followed[0]]}
        for line, row in zip(lines, [0, 2, 4, 6, 8, 10, 12, 14, 1, 3], strict=True):
            ids = rollout.actions.action_ids[row][rollout.actions.action_mask[row]].tolist()
            assert_policy_numbers(line, *alone[row], ids)
            assert line["advantage"] == near(batch.advantages[row, : len(ids)].tolist())
            assert not {"q", "critic_advantage", "sampled_advantage"} & set(line)
            if algorithm == "grpo":
                assert "value" not in line
            elif algorithm == "poad":
                assert None not in line["value"]
            else:  # of prompts alone; a prefix of one action may be another's prompt
                read = [(*ids_of[line["prompt"]], *ids[:place]) for place in range(len(ids))]
                assert [x is not None for x in line["value"]] == [p in prompts for p in read]
                assert line["value"][0] is not None
    assert all("advantage" not in line for line in followed)


@pytest.mark.parametrize(
    ("algorithm", "spaces"),
    [("etpo", SPACES), ("poad", SPACES[1:]), ("etpo", SPACES[1:]), ("grpo", SPACES[2:3])],
)
def test_forced_tokens_have_probability_one_and_no_value(
    algorithm, spaces, tmp_path, build_algorithm, make_policy, fit
):
    """Also where no column of the distributions is theirs."""
    module = build_algorithm(algorithm, make_policy(), TrunkCritic)
    kept, credit = Kept(), TokenCredit(tmp_path, "rooms", 1, 16)
    fit(module, Rooms(4, spaces), 2, [credit, kept], minibatch_size=16, max_new_tokens=9)
    lines, rollout = rows_of(tmp_path)[0][16:], kept.seen[1][0]
    actions, alone = rollout.actions, kept.seen[1][2]
    allowed = allowed_of(module.policy, actions, spaces)
    rows = [row for env in range(4) for row in range(env, 32, 4)][:16]
    numbers = [n for n in ("value", "q", "advantage", "critic_advantage") if n in lines[0]]
    assert ("value" in numbers) == (algorithm != "grpo")
    forced = 0
    for line, row in zip(lines, rows, strict=True):
        assert "".join(line["text"]) == rollout.records[row].action
        for place, step in enumerate(actions.step_mask[row][actions.action_mask[row]].tolist()):
            others = line["alternatives"][place]
            if not step:
                forced += 1
                assert line["probability"][place] == 1
                assert [line[n][place] for n in ("log_ratio", "entropy", "kl")] == [0, 0, 0]
                assert {line[n][place] for n in ("value", "q") if n in line} <= {None}
                assert others == []
                continue
            inside, token = allowed[row, place], int(actions.action_ids[row, place])
            log_pi, log_ref = (
                x[place].where(inside, -torch.inf).log_softmax(-1) for x in alone[row]
            )
            assert line["probability"][place] == near(float(log_pi[token].exp()))
            assert line["log_ratio"][place] == near(float(log_pi[token] - log_ref[token]))
            assert line["entropy"][place] == near(float(-(log_pi.exp() * log_pi)[inside].sum()))
            assert len(others) == min(5, int(inside.sum()) - 1)
            assert None not in [line[n][place] for n in numbers]
    assert forced > 20


def test_values_are_computed_before_the_update(recorded, build_baseline):
    module = build_baseline("poad")
    parts, _, _ = recorded(module)
    assert all(set(line["value"]) == {0.0} for line in parts[0])  # a fresh critic's
    assert any(abs(x) > 1e-3 for line in parts[1] for x in line["value"])


def test_a_frozen_model_has_no_advantage(tmp_path, fit, letter_env, make_policy):
    module = NoUpdate(make_policy(min_p=0.02)(), NoUpdateSettings())
    fit(module, letter_env(2), 1, [TokenCredit(tmp_path, "letters", 1, 4)], update_epochs=1)
    sampled, _ = rows_of(tmp_path)
    for line in sampled:
        assert not {"advantage", "value", "q"} & set(line)
        # `min_p` alone moves the policy away from the reference
        assert min(line["kl"]) >= 0
        assert max(line["kl"]) > 1e-3


def test_the_worst_first_action_is_followed(recorded, build_etpo):
    parts, followed, seen = recorded(build_etpo(), 3)
    worst = min(parts[0], key=lambda line: line["reward"])
    for number, line in enumerate(followed):
        assert (line["iteration"], line["followed"]) == (number, 0)
        for name in ("env", "episode", "attempt", "prompt", "reward", "text"):
            assert line[name] == worst[name]
        # no return belongs to it later: the critic's part alone
        assert "sampled_advantage" not in line
    # a fresh policy is the reference; then both move
    assert max(map(abs, followed[0]["log_ratio"])) == near(0)
    for name in ("log_ratio", "q", "value"):
        assert followed[1][name] != followed[2][name]
    place = parts[0].index(worst)
    rollout, _, alone, *_ = seen[0]
    row = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3][place]
    ids = rollout.actions.action_ids[row][rollout.actions.action_mask[row]].tolist()
    assert_policy_numbers(followed[0], *alone[row], ids)


def test_every_so_many_iterations(tmp_path, fit, letter_env, build_etpo):
    fit(build_etpo(), letter_env(2), 4, [TokenCredit(tmp_path, "letters", 3, 2)])
    sampled, followed = rows_of(tmp_path)
    assert [line["iteration"] for line in sampled] == [0, 0, 3, 3]
    assert [line["iteration"] for line in followed] == [0, 3]


def test_watching_changes_nothing(tmp_path, fit, letter_env, build_etpo):
    weights = []
    for callbacks in ([], [TokenCredit(tmp_path, "letters", 1, 4)]):
        torch.manual_seed(0)
        module = build_etpo()
        fit(module, letter_env(2), 2, callbacks)
        weights.append([p.detach().clone() for p in module.policy.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("key", ["every_n_iterations", "num_actions"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_bad_values_are_one_line(tmp_path, key, value):
    values = {"every_n_iterations": 1, "num_actions": 1} | {key: value}
    with pytest.raises(
        ConfigError, match=rf"callbacks\.credit\.{key}={value}: allowed is 1 or more"
    ):
        TokenCredit(tmp_path, "letters", **values)
