"""Train the embedded language model from scratch: `python -m tiny_lm.build`.

Prompt and answer are tokenized separately and joined as prompt ids + answer ids + EOS, without BOS.
The model is a Llama with about 0.9 million float32 parameters and tied embeddings.
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from tiny_lm.corpus import Example, sample_example
from tiny_lm.grammar import parse
from tiny_lm.tokenizer import CONTEXT, train_tokenizer

CHECKPOINT = Path(__file__).parents[1] / "etpo/models/tiny/checkpoint"
VOCABULARY = 1024
TOKENIZER_EXAMPLES = 20_000
PROMPT_WEIGHT = 0.1
POOL = 4096
WARMUP = 100


class Batch(NamedTuple):
    """A batch of examples, padded on the right.

    Attributes:
        ids: [batch, length] int64.
        weight: [batch, length] float32 loss weight: 1 on the answer and EOS, `PROMPT_WEIGHT` on the
            prompt, 0 on padding.
    """

    ids: Tensor
    weight: Tensor


def encode(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, answer ids + EOS) of every example, sorted by total length."""
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    actions = tokenizer([example.action for example in examples])["input_ids"]
    ends = [[*action, tokenizer.eos_token_id] for action in actions]
    return sorted(zip(prompts, ends, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))


def collate(pairs: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Pad examples to one batch, truncated to the context length."""
    length = max(len(prompt) + len(action) for prompt, action in pairs)
    ids = torch.full((len(pairs), length), pad)
    weight = torch.zeros(ids.shape)
    for row, (prompt, action) in enumerate(pairs):
        end = len(prompt) + len(action)
        ids[row, :end] = torch.tensor([*prompt, *action])
        weight[row, : len(prompt)] = PROMPT_WEIGHT
        weight[row, len(prompt) : end] = 1.0
    return Batch(ids[:, :CONTEXT], weight[:, :CONTEXT])


def group(pairs: list[tuple[list[int], list[int]]], pad: int, batch_tokens: int) -> Iterator[Batch]:
    """Yield batches of at most `batch_tokens` cells from `pairs`, which are sorted by length."""
    chosen = []
    for pair in pairs:
        if chosen and (len(chosen) + 1) * (len(pair[0]) + len(pair[1])) > batch_tokens:
            yield collate(chosen, pad)
            chosen = []
        chosen.append(pair)
    yield collate(chosen, pad)


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, batch_tokens: int
) -> Iterator[Batch]:
    """Yield endless batches of new examples; each holds examples of similar length."""
    while True:
        pairs = encode(tokenizer, [sample_example(rng) for _ in range(POOL)])
        ready = list(group(pairs, tokenizer.pad_token_id, batch_tokens))
        rng.shuffle(ready)
        yield from ready


def language_model_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return the weighted mean cross-entropy per token, in nats."""
    logits = model(input_ids=batch.ids[:, :-1]).logits  # [batch, length - 1, vocabulary]
    loss = functional.cross_entropy(
        logits.flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none"
    )
    weight = batch.weight[:, 1:].flatten()
    return (loss * weight).sum() / weight.sum()


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a randomly initialised Llama, drawn from PyTorch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, data: Iterator[Batch], steps: int, learning_rate: float
) -> list[float]:
    """Train with AdamW, linear warm-up and cosine decay to a twentieth; return all losses."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    losses = []
    started = time.monotonic()
    for step in range(steps):
        cosine = 0.525 + 0.475 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP) * cosine
        with torch.autocast("cpu", torch.bfloat16):
            loss = language_model_loss(model, next(data))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            mean = sum(losses[-200:]) / 200
            print(
                f"step {step + 1}  loss {mean:.3f}  {time.monotonic() - started:.0f} s", flush=True
            )
    return losses


@torch.no_grad()
def sample_actions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """Sample one answer to each prompt at temperature 1."""
    model.eval()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=80)
    answers = output[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, samples: int
) -> dict[str, float]:
    """Measure the model on `samples` held-out examples and `samples` sampled first attempts.

    Returns:
        `held_out_loss`: mean loss per answer token, in nats. `in_grammar`: share of the sampled
        answers that the grammar can produce. `valid`: share that it produces without a mistake.
    """
    model.eval()
    rng = random.Random(f"held out {seed}")
    examples = [sample_example(rng) for _ in range(samples)]
    loss = tokens = 0.0
    for batch in group(encode(tokenizer, examples), tokenizer.pad_token_id, 4096):
        answer = batch._replace(weight=(batch.weight == 1.0).float())
        count = answer.weight.sum().item()
        loss += language_model_loss(model, answer).item() * count
        tokens += count
    prompts = [example.prompt for example in examples if example.kind == "first"]
    bodies = sample_actions(model, tokenizer, rng.choices(prompts, k=samples))
    programs = [parse(body) for body in bodies]
    known = [program for program in programs if program is not None]
    return {
        "held_out_loss": loss / tokens,
        "in_grammar": len(known) / samples,
        "valid": sum(program.mistake is None for program in known) / samples,
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint and SHA256SUMS over its files."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    stated = json.loads(settings.read_text())
    # Text is never a control token: a program that spells one out stays what it is.
    stated |= {"add_bos_token": False, "add_eos_token": False, "split_special_tokens": True}
    settings.write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n")
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names)
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def build(
    folder: Path, steps: int, seed: int, batch_tokens: int, learning_rate: float, samples: int
) -> tuple[list[float], dict[str, float]]:
    """Train and save tokenizer and model; return the training losses and the evaluation."""
    set_seed(seed)
    rng = random.Random(seed)
    examples = [sample_example(rng) for _ in range(TOKENIZER_EXAMPLES)]
    texts = [example.action for example in examples]
    texts += [example.prompt for example in examples[: TOKENIZER_EXAMPLES // 3]]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    model = new_model(tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters", flush=True)
    losses = train(model, batches(tokenizer, rng, batch_tokens), steps, learning_rate)
    save(model, tokenizer, folder)
    return losses, evaluate(model, tokenizer, seed, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny base language model.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the schedule")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=512, help="held-out examples and answers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    _, measured = build(
        options.out,
        options.steps,
        options.seed,
        options.batch_tokens,
        options.learning_rate,
        options.samples,
    )
    print("  ".join(f"{name} {value:.3f}" for name, value in measured.items()))


if __name__ == "__main__":
    main()
