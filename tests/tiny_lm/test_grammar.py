"""What the grammar says of its programs, against Python and scikit-learn themselves."""

import random

import pytest

from etpo_tasks.data_science.prompts import program_from_action
from tiny_lm.estimators import ESTIMATORS
from tiny_lm.grammar import parse, sample, sample_improvement, sample_repair
from tiny_lm.mistakes import KINDS


def beginning(error: str) -> str:
    """An error without the parts that differ between machines: paths, the order of a set."""
    return error.split(" among ")[0].split(" (/")[0]


def test_every_kind_of_mistake_and_every_estimator_occurs(programs):
    assert {p.mistake.kind for p in programs if p.mistake} == set(KINDS)
    assert {p.estimator.name for p in programs} == {estimator.name for estimator in ESTIMATORS}


def test_a_mistake_changes_the_text(programs):
    for program in programs:
        if program.mistake:
            assert program.render() != program._replace(mistake=None).render()


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_that_running_raises(kind, programs, run_small):
    chosen = [p for p in programs if p.mistake and p.mistake.kind == kind][:8]
    outcomes = run_small([program_from_action(p.render()) for p in chosen])
    for program, outcome in zip(chosen, outcomes, strict=True):
        assert outcome.error is not None, program.render()
        assert outcome.error.startswith(beginning(program.error())), program.render()


def test_programs_without_a_mistake_run_in_little_time(programs, run_small):
    chosen = [p for p in programs if p.mistake is None][:60]
    outcomes = run_small([program_from_action(p.render()) for p in chosen])
    for program, outcome in zip(chosen, outcomes, strict=True):
        assert outcome.error is None, program.render()
        assert outcome.seconds < 1.0, program.render()


def test_a_seed_repeats_the_draws():
    one, two = random.Random(3), random.Random(3)
    assert [sample(one) for _ in range(50)] == [sample(two) for _ in range(50)]


def test_parse_finds_the_program_and_its_mistake(programs):
    for program in programs[:150]:
        found = parse(program.render())
        assert found.render() == program.render()
        assert (found.mistake is None) == (program.mistake is None)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "    return 1\n",
        "    from sklearn.svm import SVC\n"
        "    return SVC(probability=False).fit(x_train, y_train)\n",
        "    from sklearn.tree import DecisionTreeClassifier\n"
        "    model = DecisionTreeClassifier(max_depth=4)\n"
        "    model.fit(x_train, y_train)\n    return model\n",
        "    from sklearn.tree import DecisionTreeClassifier\n"
        "    model = DecisionTreeClassifier()\n    model.fit(x_train, y_train)\n    return model",
    ],
)
def test_parse_refuses_what_the_grammar_cannot_write(body):
    assert parse(body) is None


def test_most_repairs_are_the_failed_program_put_right():
    rng = random.Random(0)
    pairs = [sample_repair(rng) for _ in range(1000)]
    assert all(failed.mistake for failed, _ in pairs)
    same = sum(answer == failed._replace(mistake=None) for failed, answer in pairs)
    assert 0.65 < same / 1000 < 0.75


def test_improvements_know_nothing_of_the_score():
    rng = random.Random(0)
    draws = [sample_improvement(rng) for _ in range(4000)]
    assert all(working.mistake is None for working, _, _ in draws)
    high = [answer for _, score, answer in draws if score > 0.7]
    low = [answer for _, score, answer in draws if score <= 0.7]

    def boosted(answers):
        return sum("Boosting" in a.estimator.name for a in answers) / len(answers)

    assert 0.45 < len(high) / 4000 < 0.55
    assert abs(boosted(high) - boosted(low)) < 0.05  # 3.2 standard errors
    plain = [sample(rng) for _ in range(4000)]
    assert 0.1 < boosted(plain) < 0.25  # 2 of 14 estimators, a little above their even share
    assert boosted(high) > boosted(plain) + 0.05
