"""Questions of reasoning_gym: rewards, parts, examples and bad input."""

import pytest
from gymnasium.utils.env_checker import check_env

from etpo.environments.gymnasium_env import GymnasiumEnv
from etpo.errors import ConfigError

pytest.importorskip("reasoning_gym")

from etpo_tasks.reasoning_gym_env import ReasoningGymEnv


@pytest.mark.parametrize("dataset", ["chain_sum", "letter_counting", "syllogism", "maze"])
def test_the_right_answer_pays_one(dataset):
    environment = ReasoningGymEnv(dataset=dataset)
    for seed in range(5):
        environment.reset(seed=seed)
        right = str(environment.entry["answer"])
        result = environment.step(f" {right}\n")
        assert result[1:3] == (1.0, True)
        environment.reset(seed=seed)
        assert environment.step(f"{right} or so?")[1] < 1


def test_gymnasium_accepts_it():
    check_env(ReasoningGymEnv(dataset="chain_sum", render_mode="ansi"))


def test_questions_of_training_evaluation_and_examples_differ():
    environment = ReasoningGymEnv(dataset="gcd", options={"max_value": 20, "min_value": 1})
    train = {environment.reset(seed=s)[0]["instruction"] for s in range(300)}
    options = {"evaluation": True}
    held_out = {environment.reset(seed=s, options=options)[0]["instruction"] for s in range(300)}
    shown = {question["instruction"] for question, _ in environment.examples(20)}
    assert min(map(len, (train, held_out, shown))) > 5
    assert not train & held_out
    assert not shown & (train | held_out)


def test_examples_are_questions_with_their_answers():
    environment = ReasoningGymEnv(dataset="chain_sum")
    question, answer = environment.examples(2)[1]
    assert question["prefix"] == f"Q: {question['instruction']}\nA: "
    assert str(eval(question["instruction"].split(": ")[1].rstrip(" =?."))) == answer


def test_options_set_the_difficulty_and_a_seed_repeats():
    def questions(**options):
        environment = GymnasiumEnv(
            id="etpo_tasks.reasoning_gym_env:etpo/ReasoningGym-v0",
            num_envs=3,
            kwargs={"dataset": "chain_sum", "options": options},
        )
        first, _ = environment.reset(seed=0)
        return [o["prefix"] for o in (*first, *environment.step(["1"] * 3)[0])]

    short = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert questions() == questions()
    assert len(max(questions(**short), key=len)) < len(min(questions(), key=len))


def test_an_exception_of_a_scorer_is_a_failure(monkeypatch):
    environment = ReasoningGymEnv(dataset="chain_sum")
    environment.reset(seed=0)

    def score_answer(answer, entry):
        raise KeyError(answer)

    monkeypatch.setattr(environment.dataset, "score_answer", score_answer)
    _, reward, terminated, _, info = environment.step("x")
    assert (reward, terminated, info["error"]) == (0.0, True, "KeyError: 'x'")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dataset": "sums"}, r"environment\.kwargs\.dataset=sums: allowed are names"),
        (
            {"options": {"max_terms": -1}},
            r"environment\.kwargs\.options=\{'max_terms': -1\}: .*allowed",
        ),
        ({"options": {"colour": 1}}, r"environment\.kwargs\.options=\{'colour': 1\}: .*colour"),
        ({"split_seed": -1}, r"environment\.kwargs\.split_seed=-1: allowed"),
    ],
)
def test_bad_input_is_one_line(changes, line):
    with pytest.raises(ConfigError, match=f"^{line}"):
        ReasoningGymEnv(**{"dataset": "chain_sum"} | changes)
