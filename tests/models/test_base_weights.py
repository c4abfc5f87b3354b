"""A checkpoint without the frozen weights is refused where they are other ones."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from etpo import evaluate, export, train
from etpo.models.base_weights import same_weights, weight_sample


def rounded(weight, levels=16, block=32):
    """Round as four-bit formats do: to `levels` between the extremes of each block."""
    rows = weight.reshape(-1, block)
    low, high = rows.min(1, keepdim=True)[0], rows.max(1, keepdim=True)[0]
    step = (high - low) / (levels - 1)
    return ((rows - low) / step).round().mul(step).add(low).reshape(weight.shape)


def test_types_are_the_same_weights_and_four_bits_are_not():
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 32)
    sample = weight_sample(model)
    for dtype in (torch.bfloat16, torch.float16):
        assert same_weights(sample, weight_sample(model.to(dtype).float()))
    with torch.no_grad():
        model.weight.copy_(rounded(model.weight))
    assert not same_weights(sample, weight_sample(model))
    assert not same_weights(sample, sample[:1])


@pytest.mark.parametrize("lora", ["model/lora=r16", "model.lora=null"])
def test_other_base_weights_are_refused(lora, command, small_run, checkpoint, tmp_path):
    folder, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(checkpoint("llama"), folder)
    model = "model=causal_lm", f"model.name_or_path={folder}", lora, "trainer.max_epochs=1"
    ended = command(train.main, *small_run, *model, f"hydra.run.dir={run}")
    assert ended.status == 0, ended.err
    last = run / "checkpoints" / "last.ckpt"
    changed = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.05)
    changed.save_pretrained(folder)
    line = (
        f"error: ckpt_path={last}: model.name_or_path has other weights now than when the run was "
        "started; allowed are the same ones\n"
    )
    for main, *more in (
        (train.main, "trainer.max_epochs=2"),
        (evaluate.main, "samples=1"),
        (export.main, f"out={tmp_path / 'out'}"),
    ):
        ended = command(main, f"ckpt_path={last}", *more)
        assert (ended.status, ended.err) == (2, line), main
