"""The block that is printed before the first iteration, against what the run then takes."""

import json
import re

import pytest

from etpo.callbacks.start import StartReport
from etpo.config import tiny_checkpoint
from etpo.models.loading import load_tokenizer
from etpo_tasks.random_init import random_llama, save_checkpoint

MIB = {"MiB": 1, "GiB": 1024}


def row(out, label):
    """The text of a row of the block, which comes before the first iteration."""
    block = out.partition("iteration 1/")[0]
    (found,) = re.findall(rf"^  {label} +(.*)$", block, re.MULTILINE)
    return found


def sizes(text):
    """The sizes that a text holds, in MiB."""
    return [float(n) * MIB[unit] for n, unit in re.findall(r"([\d.]+) (MiB|GiB)", text)]


def check_memory(out, folder, differing_prompt_tokens):
    """The expected memory is within 30% of what the process of the run took."""
    summary = json.loads((folder / "summary.json").read_text())
    memory, more = sizes(row(out, "memory"))
    memory += more * differing_prompt_tokens / 100
    assert memory == pytest.approx(summary["peak_memory_mib"], rel=0.3)


def check_checkpoints(out, folder):
    """The expected sizes of the checkpoints are within 30% of those of the files."""
    files = [folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    expected = [file.stat().st_size / 2**20 for file in files]
    assert sizes(row(out, "checkpoints")) == pytest.approx(expected, rel=0.3)


def test_a_run_begins_with_what_it_is_and_takes(finished_run):
    out = finished_run.out
    assert out.startswith("etpo on tic_tac_toe, tiny\n")
    assert row(out, "device").startswith("cpu, 32-true")
    assert "3 x 16 actions of at most 48 tokens" in row(out, "iterations")
    assert row(out, "folder").endswith(finished_run.folder.name)
    trained, total = re.fullmatch(
        r"([\d.]+) M trained of ([\d.]+) M in all", row(out, "parameters")
    ).groups()
    assert 0 < float(trained) < float(total)
    check_checkpoints(out, finished_run.folder)


def test_without_checkpoints_none_are_expected(tmp_path, fit, capsys):
    fit([StartReport(str(tmp_path), "iris", "some model")], 1)
    out = capsys.readouterr().out
    assert "some model" in out
    assert not re.search("^  checkpoints ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("task", "model", "warned"),
    [("sokoban", "tiny", 1), ("data_science", "tiny", 0), ("sokoban", "Qwen3-0.6B", 0)],
)
def test_the_embedded_model_in_another_task_is_warned_of(
    task, model, warned, tmp_path, fit, script_environment, capsys
):
    script_environment.task_name = task
    fit([StartReport(str(tmp_path), task, model)], 1, environment=script_environment)
    assert capsys.readouterr().err.count("model.name_or_path") == warned


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["algorithm=grpo"], ["algorithm.logits_chunk_size=64"]])
def test_a_larger_model_takes_what_is_expected(options, start_train, tmp_path):
    tokenizer = load_tokenizer(tiny_checkpoint())
    tokenizer.add_tokens([f"<new {n}>" for n in range(4096 - len(tokenizer))])
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    save_checkpoint(tmp_path / "model", random_llama(tokenizer, 0, **sizes), tokenizer)
    process = start_train(
        tmp_path,
        *("model=causal_lm", f"model.name_or_path={tmp_path / 'model'}", "environment=sokoban"),
        "environment.kwargs.choices=false",  # actions have the greatest length
        *("model.max_prompt_tokens=256", "model.gradient_checkpointing=false"),
        *("rollout.num_envs=8", "rollout.actions_per_iteration=16", "rollout.minibatch_size=8"),
        *("rollout.update_epochs=1", "rollout.max_new_tokens=64", "trainer.max_epochs=1"),
        *(f"hydra.run.dir={tmp_path / 'run'}", *options),
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    check_memory(out, tmp_path / "run", sum(lengths) / len(lengths))
    check_checkpoints(out, tmp_path / "run")
