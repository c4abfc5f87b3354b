"""`etpo-sft`: what is fitted is what is sampled; sources, bad input, repetition, resumption."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from etpo import pretrained, sft
from etpo.config import tiny_checkpoint
from etpo.generation.sampler import decode_actions, generate
from etpo.models.chat_template import ChatTemplate
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.sft_callbacks import FitProgress
from etpo.sft_data import Example, programs
from etpo.sft_module import (
    Answer,
    collate,
    encode,
    encode_turn,
    negative_log_likelihood,
)

REAL = pretrained.cache_dir() / "smollm2-135m"
# with the output layer: the random one of a small model allows no probability near 1
LORA = (
    "model.lora={r:8,lora_alpha:16,target_modules:[q_proj,v_proj,up_proj,down_proj,lm_head],"
    "task_type:CAUSAL_LM}"
)
PAIRS = {"the sum of one and two is": " three", "def f():\n": "    return 'é'\n"}


def observation(text):
    return {"instruction": text, "prefix": text, "suffix": ""}


def write(file: Path, *lines) -> Path:
    file.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return file


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def fit(command, checkpoint, tmp_path):
    """fit(source, *overrides): runs `etpo-sft` on a small random model; the run's folder."""

    def call(source, *overrides, name="run", status=0):
        folder = tmp_path / name
        arguments = (
            *("model=chat_lm", f"model.name_or_path={checkpoint('smollm2')}", "fit.lr=1e-2"),
            *(f"data.source={source}", "data.batch_size=2", f"hydra.run.dir={folder}"),
        )
        ended = command(sft.main, *arguments, *overrides)
        assert ended.status == status, ended.err
        call.ended = ended
        return folder

    call.command = command
    return call


@pytest.mark.parametrize("prompt", ["chat", "completion"])
@pytest.mark.parametrize("lora", [LORA, "model.lora=null"], ids=["lora", "all"])
def test_two_answers_are_learned(fit, tmp_path, prompt, lora):
    lines = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS.items()]
    overrides = (f"model/prompt={prompt}", lora, "trainer.max_epochs=150", "fit.lr=2e-2")
    folder = fit(write(tmp_path / "a.jsonl", *lines), *overrides, "data.val_share=0")
    assert float(metrics(folder)[-1]["train/loss"]) < 0.05
    template = ChatTemplate() if prompt == "chat" else CompletionTemplate()
    policy = LanguageModelPolicy(str(folder / "model"), template, stop_tokens=["<|im_end|>"])
    prompts = policy.encode([observation(text) for text in PAIRS])
    sample = generate(policy, prompts, 30, None)
    assert decode_actions(policy, prompts, sample) == list(PAIRS.values())
    assert not sample.length_limited.any()
    written, following = fit.ended.out.splitlines()[-2:]
    assert written == f"written: {folder / 'model'}"
    assert following.startswith(f"next: etpo-train model=chat_lm model.name_or_path={folder}/model")
    assert f"model/prompt={prompt}" in following


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_fitted_is_what_is_sampled(temperature):
    """The loss of sampled actions, encoded as examples, is the sampler's own -log pi."""
    policy = LanguageModelPolicy(
        tiny_checkpoint(), CompletionTemplate(), temperature=temperature, min_p=0.0
    )
    example = programs(1, 0.0, 0, fenced=False)[0]
    prompts = policy.encode([example.observation] * 12)
    sample = generate(policy, prompts, 96, torch.Generator().manual_seed(3))
    recorded = policy.log_probs(sample.hidden_states).log_probs.gather(-1, sample.ids[..., None])
    texts = decode_actions(policy, prompts, sample)
    rows, expected = [], []
    for row, text in enumerate(texts):
        if not sample.length_limited[row]:
            turn = encode_turn(policy, Example(example.observation, text, "a"), None)
            if turn.action_ids == sample.ids[row][sample.mask[row]].tolist():  # not always
                rows.append(Answer(tuple(turn.prompt_ids), tuple(turn.action_ids)))
                expected.append(recorded[row, : len(turn.action_ids), 0])
    assert len(rows) > 4
    policy.min_p = 0.1  # truncates samples, never the loss
    batch = collate(rows, policy.pad_id)
    loss, log_probs = negative_log_likelihood(policy, batch, chunk=50)
    torch.testing.assert_close(
        log_probs[batch.action_mask], torch.cat(expected), rtol=1e-4, atol=1e-4
    )
    assert loss.item() == pytest.approx(-torch.cat(expected).mean().item(), rel=1e-4)


def test_gradient_is_the_one_of_cross_entropy(checkpoint):
    """On actions that begin alike, one of them twice."""
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    examples = [Example(observation("go"), text, "a") for text in ("abc", "abd", "abc", "x")]
    answers, _ = encode(policy, [[example] for example in examples], 10)
    loss, _ = negative_log_likelihood(policy, collate(answers, policy.pad_id), chunk=3)
    loss.backward()
    found = [p.grad.clone() for p in policy.trainable_parameters()]
    policy.zero_grad()
    total = sum(len(answer.action_ids) for answer in answers)
    for prompt, action in answers:
        logits = policy.model(torch.tensor([[*prompt, *action]])).logits[0, len(prompt) - 1 : -1]
        logits = logits[:, : policy.vocabulary_size]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(action), reduction="sum")
        (loss / total).backward()
    for one, parameter in zip(found, policy.trainable_parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-5)


BAD = [
    ("nothing", "data.source={file}: the file is empty"),
    ("[1]", "{file}:1: [1]; allowed are lines"),
    ('{"prompt": "a", "answer": "b"}\n{"prompt"', "{file}:2: not JSON ("),
    ('{"prompt": "a", "answer": 3}', "{file}:1: answer=3: allowed is text"),
    ('{"prompt": "a", "response": "b"}', "{file}:1: the keys are prompt, response; allowed"),
    ('{"instruction": "a", "answer": "b", "x": 1}', "{file}:1: observation="),
    ('{"messages": 3}', "{file}:1: observation['messages']=3: allowed is a list"),
    ('{"messages": []}', "{file}:1: messages: allowed are ones that end with the assistant"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "{file}:1: messages: allowed"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "{file}:1: messages[0] is the"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "{file}:1: observation['messages']: r"),
    ('{"action": "a", "reward": 1, "env": 0, "attempt": 1}', "{file}:1: no observation; all"),
    ('{"prompt": "a", "answer": "b</s>c"}', "{file}:1: the answer 'b</s>c' reads 'b' as"),
]


@pytest.mark.parametrize(("content", "expected"), BAD)
def test_a_bad_line_is_named_with_its_number(fit, tmp_path, content, expected):
    file = tmp_path / "a.jsonl"
    file.write_text("" if content == "nothing" else content)
    folder = fit(file, status=2)
    assert fit.ended.err.startswith(f"error: {expected.format(file=file)}")
    assert fit.ended.err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.source=none.jsonl",), "data.source=none.jsonl: cannot be read"),
        (("fit.lr=0",), "fit.lr=0: allowed is a number, above 0"),
        (("fit.schedule=step",), "fit.schedule=step: allowed are linear, cosine"),
        (("data.val_share=1",), "data.val_share=1: allowed"),
        (("data.max_answer_tokens=1",), "data.max_answer_tokens=1: all 1 answers are longer"),
        (("model.stop_strings=[b]", "model/prompt=completion"), "{file}:1: the answer 'b' reads"),
        (("trainer.devices=2",), "trainer.devices=2: allowed is 1"),
        (("out={folder}",), "out={folder} exists"),
    ],
)
def test_bad_settings_are_one_line(fit, tmp_path, overrides, expected):
    names = {
        "file": write(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b"}),
        "folder": tmp_path,
    }
    folder = fit(names["file"], *(o.format(**names) for o in overrides), status=2)
    assert fit.ended.err.startswith(f"error: {expected.format(**names)}"), fit.ended.err
    assert fit.ended.err.count("\n") == 1
    assert not folder.exists()


def test_messages_need_a_chat_template(fit, tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write(tmp_path / "a.jsonl", {"messages": messages})
    fit(file, "model/prompt=completion", status=2)
    assert fit.ended.err.startswith(f"error: {file}:1: messages need a chat template")


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def same(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_seeded_run_repeats_and_continues_after_an_interruption(fit, tmp_path, monkeypatch):
    lines = [{"prompt": f"{n}+1=", "answer": f" {n + 1}"} for n in range(8)]
    file = write(tmp_path / "a.jsonl", *lines)
    fit(file, "trainer.max_epochs=3")
    expected = weights(tmp_path / "run")
    assert [set(row) >= {"train/loss", "val/loss"} for row in metrics(tmp_path / "run")] == [
        True
    ] * 3
    fit(file, "trainer.max_epochs=3", name="again")
    assert same(expected, weights(tmp_path / "again"))
    fit(file, "trainer.max_epochs=3", "seed=1", name="other")
    assert not same(expected, weights(tmp_path / "other"))

    def interrupt(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FitProgress, "on_train_epoch_start", interrupt)
        folder = fit(file, "trainer.max_epochs=3", name="stopped", status=130)
    assert not (folder / "model").exists()
    ended = fit.command(sft.main, f"ckpt_path={folder}")
    assert ended.status == 0, ended.err
    assert same(expected, weights(folder))
    assert metrics(folder) == metrics(tmp_path / "run")


def test_the_epoch_with_the_lowest_validation_loss_is_written(fit, tmp_path):
    """Answers that cannot be guessed: validation gets worse."""
    lines = [{"prompt": f"{n * 7919}", "answer": f"{n * n * 104729}"} for n in range(12)]
    file = write(tmp_path / "a.jsonl", *lines)
    overrides = ("model.lora=null", "fit.schedule=constant_with_warmup", "fit.warmup_share=0")
    folder = fit(file, *overrides, "trainer.max_epochs=12", "data.val_share=0.3")
    losses = [float(row["val/loss"]) for row in metrics(folder)]
    best = min(range(12), key=losses.__getitem__)
    assert best < 11
    fit(file, *overrides, f"trainer.max_epochs={best + 1}", "data.val_share=0.3", name="short")
    assert same(weights(folder), weights(tmp_path / "short"))


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no model; make pretrained fetches it")
def test_smollm2_learns_the_form_of_programs(fit):
    folder = fit(
        "programs",
        *("model=smollm2-135m", f"model.name_or_path={REAL}", "model/prompt=completion"),
        *("data.num_programs=90", "data.batch_size=9", "fit.lr=1e-3"),
    )
    (row,) = metrics(folder)
    assert float(row["val/loss"]) < 0.8
