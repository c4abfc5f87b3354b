"""Compare an ETPO iteration with a step of TRL's GRPOTrainer on the same work, in one run.

    pip install -e ".[bench]"
    python benchmarks/iteration.py [--models 0.9M 25M smollm2-135m] [--rounds 3] [--steps 2]

Both sample the same number of completions of the same length on the same prompts, evaluate a frozen
reference, and update once; ETPO also trains its critic over the vocabulary. float32, no gradient
checkpointing. Random Llamas train all weights, SmolLM2 (after `make pretrained`) LoRA of rank 16 on
all linear layers. The trainers alternate in each round; the first step of each turn is dropped. The
script writes `iteration.csv` and `iteration.png`; its table has the medians over all steps.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from common import (
    ALL_MODELS,
    MODELS,
    RESULTS,
    SMOLLM2,
    Iterations,
    model_folder,
    prompt_of,
    worked_questions,
    write,
)
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from etpo.runtime import keep_freed_memory

PROMPT_TOKENS = 165
TRL = "TRL GRPOTrainer"


class Workload(NamedTuple):
    """Completions of `new_tokens` tokens, `group` on each prompt in a group of TRL.

    batch: rows of a TRL micro-batch, whose gradients add up to one update.
    """

    prompts: list[str]
    group: int
    new_tokens: int
    batch: int


def workloads(model: str, folder: str) -> dict[str, Workload]:
    """Return the workloads of a model."""
    prompt = prompt_of(PROMPT_TOKENS, folder=folder)
    if model != SMOLLM2:
        return {"64 x 120 tokens, one prompt": Workload([prompt] * 64, 64, 120, 64)}
    questions = [question for question, _ in worked_questions(64)]
    fours = [question for question in questions[:16] for _ in range(4)]
    return {
        "64 x 4 tokens, 16 questions": Workload(fours, 4, 4, 16),
        # TRL needs a group of two, and computes equal rows as often as different ones
        "64 x 4 tokens, 64 questions": Workload(questions, 2, 4, 16),
        "32 x 64 tokens, one prompt": Workload([prompt] * 32, 32, 64, 4),
    }


def etpo_overrides(model: str) -> dict[str, tuple[str, ...]]:
    """Return the variants of ETPO by the overrides of their configuration."""
    if model != SMOLLM2:
        critics = ("frozen_trunk", "full")
        return {f"ETPO, critic={critic}": (f"critic={critic}",) for critic in critics}
    common = f"model={SMOLLM2}", "model/prompt=completion", "algorithm.truncation_kl_coef=0"
    common += ("model.gradient_checkpointing=false",)  # as TRL
    common += ("algorithm.logits_chunk_size=512",)  # 100 MB of logits at once
    return {f"ETPO, min_p={p}": (*common, f"model.min_p={p}") for p in (0.02, 0)}


class StepClock(TrainerCallback):
    """Record the end time of each TRL step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())


def grpo_steps(folder: str, work: Workload, lora: bool) -> Callable[[int], list[float]]:
    """Return a function that runs steps of TRL's GRPO and returns their seconds."""
    random = np.random.default_rng(0)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    def reward(completions: list[str], **_: Any) -> list[float]:
        return list(random.random(len(completions)))

    def run(count: int) -> list[float]:
        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=count + 1,
            per_device_train_batch_size=work.batch,
            gradient_accumulation_steps=len(work.prompts) // work.batch,
            num_generations=work.group,
            num_iterations=1,
            max_completion_length=work.new_tokens,
            generation_kwargs={"min_new_tokens": work.new_tokens},
            beta=0.02,
            learning_rate=5e-4,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            disable_dropout=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        clock = StepClock()
        prompts = work.prompts[:: work.group] * (count + 1)
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[clock],
            peft_config=adapter if lora else None,
        )
        trainer.train()
        return list(np.diff(clock.times))

    return run


def measure(models: list[str], rounds: int, steps: int) -> pd.DataFrame:
    """Measure every step; columns model, workload, trainer, tokens, seconds."""
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory() as parent:
            folder = model_folder(Path(parent), model)
            for name, work in workloads(model, folder).items():
                trainers = {TRL: grpo_steps(folder, work, model == SMOLLM2)}
                for variant, overrides in etpo_overrides(model).items():
                    sizes = work.prompts, work.new_tokens
                    trainers[variant] = Iterations(folder, *sizes, *overrides).run
                tokens = len(work.prompts) * work.new_tokens
                for _ in range(rounds):
                    for trainer, run in trainers.items():
                        for seconds in run(steps):
                            row = {"model": model, "workload": name, "trainer": trainer}
                            rows.append(row | {"tokens": tokens, "seconds": seconds})
                            print(f"{model}  {name}  {trainer:20} {seconds:.2f} s", flush=True)
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return median seconds, sampled tokens per second and the ratio to TRL."""
    keys = ["model", "workload"]
    medians = rows.groupby([*keys, "trainer"], sort=False).median().reset_index()
    medians["tokens_per_second"] = medians["tokens"] / medians["seconds"]
    trl = medians["seconds"].where(medians["trainer"] == TRL)
    trl = trl.groupby([medians[key] for key in keys]).transform("first")
    medians["ratio"] = trl / medians["seconds"]
    return medians.drop(columns="tokens")


def figure(medians: pd.DataFrame) -> Figure:
    """Plot sampled tokens per second of every trainer, one panel per model and workload."""
    panels = list(medians.groupby(["model", "workload"], sort=False))
    drawing = Figure(figsize=(7, 1.7 * len(panels)), layout="constrained")
    column = drawing.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (names, own) in zip(column, panels, strict=True):
        axes.barh(own["trainer"], own["tokens_per_second"])
        axes.invert_yaxis()
        axes.set_title(": ".join(names))
        axes.set_xlabel("sampled tokens per second")
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=ALL_MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # as in etpo-train; both trainers benefit
    rows = measure(given.models, given.rounds, given.steps)
    medians = table(rows)
    write(given.out, "iteration", rows, medians, figure(medians))


if __name__ == "__main__":
    main()
