"""A whole iteration of ETPO against a step of TRL's GRPOTrainer on the same work, in one run.

    pip install -e ".[bench]"
    python benchmarks/iteration.py [--models small,large] [--rounds 3] [--steps 3]

Both sample 64 completions of 120 tokens on one prompt of 165 tokens from the same fresh Llama, look
at a frozen reference, and update once; ETPO also has its critic over the vocabulary. float32, all
cores, no gradient checkpointing. The trainers alternate in each round; of each turn the first step
is dropped. Writes `iteration.csv`; the table has medians over all steps.
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
from datasets import Dataset
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from etpo.config import CONF
from etpo.environments.text_env import TextObservation, TextVectorEnv
from etpo.models.backbone import load_tokenizer, tiny_checkpoint
from etpo.models.fresh import fresh_llama, save_checkpoint
from etpo.rollout.datamodule import RolloutDataModule

COMPLETIONS, PROMPT_TOKENS, NEW_TOKENS = 64, 165, 120
MODELS = {
    "0.9M": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
    "25M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8},
}


class OnePrompt(TextVectorEnv):
    """Every episode is one action on the same prompt; rewards are drawn."""

    task_name = "one prompt"

    def __init__(self, prompt: str) -> None:
        self.num_envs = COMPLETIONS
        self.observation = TextObservation(instruction=prompt, prefix=prompt, suffix="")
        self.random = np.random.default_rng(0)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return [self.observation] * self.num_envs, {}

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Any:
        n = len(envs)
        infos = {
            "final_obs": np.array([self.observation] * n, dtype=object),
            "error": np.array([None] * n, dtype=object),
            "attempt": np.ones(n, dtype=int),
            "cached": np.zeros(n, dtype=bool),
        }
        over = np.ones(n, dtype=bool)
        return [self.observation] * n, self.random.random(n), over, ~over, infos


class EpochClock(Callback):
    """When each iteration of ETPO ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.times.append(time.perf_counter())


class StepClock(TrainerCallback):
    """When each step of TRL ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(time.perf_counter())


def prompt_of(tokenizer: Any, size: int) -> str:
    """A text of `size` tokens."""
    text = ""
    while len(tokenizer(text)["input_ids"]) < size:
        text += "from sklearn.svm import SVC\n"
    while len(tokenizer(text)["input_ids"]) > size:
        text = text[:-1]
    return text


def etpo_steps(folder: str, prompt: str, critic: str) -> Callable[[int], list[float]]:
    """Runs so many iterations of ETPO, returns their seconds."""
    overrides = [f"critic={critic}", "rollout.update_epochs=1", "algorithm.max_kl=null"]
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("train", [f"model.name_or_path={folder}", "model.min_p=0", *overrides])
    backbone = instantiate(cfg.model)()
    backbone.stop_ids = []  # all completions have the same length
    module = instantiate(cfg.algorithm, backbone=lambda: backbone)

    def run(count: int) -> list[float]:
        data = RolloutDataModule(
            OnePrompt(prompt),
            actions_per_iteration=COMPLETIONS,
            minibatch_size=COMPLETIONS,
            update_epochs=1,
            max_new_tokens=NEW_TOKENS,
            num_envs=COMPLETIONS,
            seed=0,
        )
        clock = EpochClock()
        trainer = Trainer(
            max_epochs=count + 1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[clock],
        )
        trainer.fit(module, datamodule=data)
        taken = data.rollout.actions
        assert taken.action_mask.sum() == COMPLETIONS * NEW_TOKENS
        assert taken.prompt_mask.shape[1] == PROMPT_TOKENS
        return list(np.diff(clock.times))

    return run


def grpo_steps(folder: str, prompt: str) -> Callable[[int], list[float]]:
    """Runs so many steps of TRL's GRPO, returns their seconds."""
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
    """Seconds of every step: columns model, trainer, seconds."""
    rows = []
    for name in models:
        tokenizer = load_tokenizer(tiny_checkpoint())
        prompt = prompt_of(tokenizer, PROMPT_TOKENS)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            save_checkpoint(
                folder,
                fresh_llama(tokenizer, 0, tie_word_embeddings=True, **MODELS[name]),
                tokenizer,
            )
            trainers = {
                "TRL GRPOTrainer": grpo_steps(str(folder), prompt),
                "ETPO, critic=frozen_trunk": etpo_steps(str(folder), prompt, "frozen_trunk"),
                "ETPO, critic=full": etpo_steps(str(folder), prompt, "full"),
            }
            for _ in range(rounds):
                for trainer, run in trainers.items():
                    for seconds in run(steps):
                        rows.append({"model": name, "trainer": trainer, "seconds": seconds})
                        print(f"{name}  {trainer:20} {seconds:.2f} s", flush=True)
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Median seconds, sampled tokens per second and the ratio to TRL, by model and trainer."""
    medians = rows.groupby(["model", "trainer"], sort=False)["seconds"].median().reset_index()
    medians["tokens_per_second"] = COMPLETIONS * NEW_TOKENS / medians["seconds"]
    trl = medians[medians["trainer"] == "TRL GRPOTrainer"].set_index("model")["seconds"]
    medians["ratio"] = medians["model"].map(trl) / medians["seconds"]
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = measure(arguments.models, arguments.rounds, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(arguments.out / "iteration.csv", index=False)
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(rows).to_string(index=False, float_format=lambda x: f"{x:.2f}"))


if __name__ == "__main__":
    main()
