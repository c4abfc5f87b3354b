"""A small build from nothing, and what the shipped weights know."""

import hashlib
import random

import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from etpo_sandbox import Split
from etpo_tasks.data_science.datasets import load_dataset
from etpo_tasks.data_science.prompts import (
    Attempt,
    Task,
    observation,
    program_from_action,
)
from tiny_lm.build import CHECKPOINT, build, encode, group, sample_actions
from tiny_lm.corpus import sample_example
from tiny_lm.grammar import parse, sample

pytestmark = pytest.mark.slow  # relevant when the embedded model is rebuilt

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
TASK = Task("tic_tac_toe", 287, 9, 2)


@pytest.fixture(scope="module")
def small_build(tmp_path_factory):
    """(folder, losses, measured) of a build of 30 steps."""
    folder = tmp_path_factory.mktemp("tiny")
    losses, measured = build(folder, 30, 0, batch_tokens=512, learning_rate=3e-3, samples=16)
    return folder, losses, measured


def log_likelihood(model, tokenizer, prompt: str, action: str) -> float:
    """Natural log of the probability of an action and its end after a prompt."""
    left = tokenizer(prompt)["input_ids"]
    right = [*tokenizer(action)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([left + right])).logits[0, len(left) - 1 : -1]
    return -functional.cross_entropy(logits, torch.tensor(right), reduction="sum").item()


def mean_difference(model, tokenizer, triples) -> float:
    """Mean gain in log-likelihood of (prompt, other prompt, action) from the first prompt."""
    gains = [
        log_likelihood(model, tokenizer, prompt, action)
        - log_likelihood(model, tokenizer, other, action)
        for prompt, other, action in triples
    ]
    return sum(gains) / len(gains)


def test_loss_falls_in_a_small_build(small_build):
    _, losses, measured = small_build
    assert len(losses) == 30
    assert losses[0] > 6.5  # log 1024 = 6.93 nats: nothing known
    assert sum(losses[-5:]) / 5 < 6.0
    assert measured.keys() == {"held_out_loss", "in_grammar", "valid"}


def test_a_small_build_can_be_loaded_and_continued(small_build):
    folder = small_build[0]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert len(sample_actions(model, tokenizer, [observation(TASK)["prefix"]] * 3)) == 3


def test_the_shipped_vocabulary_is_the_one_that_the_code_learns(small_build, shipped_tokenizer):
    assert (
        AutoTokenizer.from_pretrained(small_build[0]).get_vocab() == shipped_tokenizer.get_vocab()
    )


def test_a_seed_repeats_a_build(small_build, tmp_path):
    losses, _ = build(tmp_path, 2, 0, batch_tokens=512, learning_rate=3e-3, samples=8)
    assert losses[0] == small_build[1][0]


@pytest.mark.parametrize("folder", ["shipped", "small"])
def test_checksums_cover_every_file(folder, small_build):
    path = CHECKPOINT if folder == "shipped" else small_build[0]
    lines = [line.split("  ") for line in (path / "SHA256SUMS").read_text().splitlines()]
    assert [name for _, name in lines] == list(FILES)
    for digest, name in lines:
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    assert (path / "model.safetensors").stat().st_size < 4_000_000


def test_batches_hold_prompt_answer_and_end(shipped_tokenizer):
    rng = random.Random(0)
    examples = [sample_example(rng) for _ in range(50)]
    pad, end = shipped_tokenizer.pad_token_id, shipped_tokenizer.eos_token_id
    texts = []
    for batch in group(encode(shipped_tokenizer, examples), pad, 1000):
        for ids, weight in zip(batch.ids, batch.weight, strict=True):
            assert (ids[weight == 0] == pad).all()
            assert ids[weight == 1][-1] == end
            prompt = shipped_tokenizer.decode(ids[(weight > 0) & (weight < 1)])
            texts.append((prompt, shipped_tokenizer.decode(ids[weight == 1][:-1])))
    assert sorted(texts) == sorted((e.prompt, e.action) for e in examples)


def test_a_repair_is_likelier_once_the_failure_is_known(shipped_model, shipped_tokenizer):
    rng = random.Random(7)
    failed = [sample(rng, mistake_rate=1.0) for _ in range(40)]
    first = observation(TASK)["prefix"]
    triples = []
    for program in failed:
        last = Attempt(program_from_action(program.render()), program.error(), None)
        repaired = program._replace(mistake=None).render()
        triples.append((observation(TASK, last)["prefix"], first, repaired))
    assert mean_difference(shipped_model, shipped_tokenizer, triples) > 3.0


def test_boosting_is_likelier_as_an_improvement(shipped_model, shipped_tokenizer):
    rng = random.Random(8)
    first = observation(TASK)["prefix"]
    triples = []
    while len(triples) < 20:
        answer = sample(rng, mistake_rate=0.0)
        if "GradientBoosting" in answer.estimator.name and answer.test_size is None:
            weak = program_from_action(sample(rng, mistake_rate=0.0).render())
            prompt = observation(TASK, Attempt(weak, None, 0.6))["prefix"]
            triples.append((prompt, first, answer.render()))
    assert mean_difference(shipped_model, shipped_tokenizer, triples) > 0.5


def test_answers_to_odd_failures_stay_programs(shipped_model, shipped_tokenizer):
    torch.manual_seed(0)
    failures = [
        ("    whatever ((\n", "TimeoutError: more than 10 CPU seconds"),
        ("", "SyntaxError: invalid syntax (line 2)"),
        (
            "    x = 1\n    return x\n",
            "AttributeError: 'int' object has no attribute 'predict_proba'",
        ),
        ("ZZZ 日本 " * 60, "RuntimeError: "),
    ]
    prompts = [
        observation(TASK, Attempt(program_from_action(body), error, None))["prefix"]
        for body, error in failures * 10
    ]
    known = [parse(body) for body in sample_actions(shipped_model, shipped_tokenizer, prompts)]
    assert sum(program is not None for program in known) >= 0.6 * len(known)


def test_first_attempts_leave_something_to_learn(
    shipped_model, shipped_tokenizer, sandbox, data_dir
):
    torch.manual_seed(0)
    count = 100
    dataset = load_dataset("tic_tac_toe", data_dir=str(data_dir))
    x, _, y, _ = train_test_split(
        dataset.features, dataset.target, train_size=0.6, stratify=dataset.target, random_state=0
    )
    x_train, x_test, y_train, y_test = train_test_split(x, y, train_size=0.5, random_state=0)
    bodies = sample_actions(shipped_model, shipped_tokenizer, [observation(TASK)["prefix"]] * count)
    best = (
        "    from sklearn.ensemble import GradientBoostingClassifier\n"
        "    model = GradientBoostingClassifier(max_depth=4, n_estimators=200)\n"
        "    model.fit(x_train, y_train)\n"
        "    return model\n"
    )
    assert parse(best).mistake is None
    outcomes = sandbox.run(
        [program_from_action(body) for body in [*bodies, best]],
        [Split(x_train, y_train, x_test)],
        2,
        0,
    )
    scores = [
        roc_auc_score(y_test, outcome.probabilities[0][:, 1])
        for outcome in outcomes
        if outcome.error is None
    ]
    sampled, strongest = scores[:-1], scores[-1]
    assert 0.3 * count <= len(sampled) <= 0.7 * count
    assert strongest > 0.97
    assert 0.6 < sum(sampled) / len(sampled) < strongest - 0.1
