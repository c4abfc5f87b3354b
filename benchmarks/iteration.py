"""Compare an ETPO iteration with a step of TRL's GRPOTrainer on the same work, in one run.

    pip install -e ".[bench]"
    python benchmarks/iteration.py [--models 0.9M 25M] [--rounds 3] [--steps 2]

Both sample 64 completions of 120 tokens on one prompt of 165 tokens from the same random Llama,
evaluate a frozen reference, and update once; ETPO also trains its critic over the vocabulary.
float32, all cores, no gradient checkpointing. The trainers alternate in each round; the first step
of each turn is dropped. The script writes `iteration.csv` and `iteration.png`; its table has the
medians over all steps.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import MODELS, RESULTS, Iterations, prompt_of, save_model, write
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from etpo.runtime import keep_freed_memory

COMPLETIONS, PROMPT_TOKENS, NEW_TOKENS = 64, 165, 120


class StepClock(TrainerCallback):
    """Record the end time of each TRL step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())


def grpo_steps(folder: str, prompt: str) -> Callable[[int], list[float]]:
    """Return a function that runs steps of TRL's GRPO and returns their seconds."""
    random = np.random.default_rng(0)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return list(random.random(len(completions)))

    def run(count: int) -> list[float]:
        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=count + 1,
            per_device_train_batch_size=COMPLETIONS,
            gradient_accumulation_steps=1,
            num_generations=COMPLETIONS,
            num_iterations=1,
            max_completion_length=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
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
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": prompt}] * (count + 1)),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[clock],
        )
        trainer.train()
        return list(np.diff(clock.times))

    return run


def measure(models: Sequence[str], rounds: int, steps: int) -> pd.DataFrame:
    """Measure every step; columns model, trainer, seconds."""
    rows = []
    prompt = prompt_of(PROMPT_TOKENS)
    sizes = COMPLETIONS, NEW_TOKENS
    for name in models:
        with tempfile.TemporaryDirectory() as parent:
            folder = save_model(Path(parent) / "model", name)
            trainers = {"TRL GRPOTrainer": grpo_steps(folder, prompt)} | {
                f"ETPO, critic={critic}": Iterations(folder, prompt, *sizes, f"critic={critic}").run
                for critic in ("frozen_trunk", "full")
            }
            for _ in range(rounds):
                for trainer, run in trainers.items():
                    for seconds in run(steps):
                        rows.append({"model": name, "trainer": trainer, "seconds": seconds})
                        print(f"{name}  {trainer:20} {seconds:.2f} s", flush=True)
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return median seconds, tokens per second and the ratio to TRL by model and trainer."""
    medians = rows.groupby(["model", "trainer"], sort=False)["seconds"].median().reset_index()
    medians["tokens_per_second"] = COMPLETIONS * NEW_TOKENS / medians["seconds"]
    trl = medians[medians["trainer"] == "TRL GRPOTrainer"].set_index("model")["seconds"]
    medians["ratio"] = medians["model"].map(trl) / medians["seconds"]
    return medians


def figure(medians: pd.DataFrame) -> Figure:
    """Plot sampled tokens per second of every trainer, one panel per model."""
    models = list(dict.fromkeys(medians["model"]))
    drawing = Figure(figsize=(7, 1.7 * len(models)), layout="constrained")
    for axes, model in zip(drawing.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        own = medians[medians["model"] == model]
        axes.barh(own["trainer"], own["tokens_per_second"])
        axes.invert_yaxis()
        axes.set_title(f"{model} parameters")
        axes.set_xlabel("sampled tokens per second")
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
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
