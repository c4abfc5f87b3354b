"""Shared parts of the benchmarks: random models, a free environment, results on disk."""

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from etpo.config import CONF, tiny_checkpoint
from etpo.environments.conversation import make_environment
from etpo.environments.text_env import TextObservation, TextVectorEnv
from etpo.models.loading import load_tokenizer
from etpo.models.policy import LanguageModelPolicy
from etpo.pretrained import pretrained
from etpo.rollout.datamodule import RolloutDataModule
from etpo_tasks.arithmetic import ArithmeticEnv
from etpo_tasks.random_init import random_llama, save_checkpoint

RESULTS = Path("benchmarks/results")
MODELS = {
    "0.9M": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
    "25M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8},
}
SMOLLM2 = "smollm2-135m"  # `make pretrained` fetches it
ALL_MODELS = [*MODELS, SMOLLM2]


class FixedPrompts(TextVectorEnv):
    """An environment per prompt, with one action per episode and random rewards."""

    task_name = "fixed prompts"

    def __init__(self, prompts: Sequence[str]) -> None:
        self.num_envs = len(prompts)
        self.observations = [observation(prompt) for prompt in prompts]
        self.random = np.random.default_rng(0)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return list(self.observations), {}

    def step_part(self, actions: Sequence[str], envs: np.ndarray) -> Any:
        n, observations = len(envs), [self.observations[env] for env in envs]
        infos = {
            "final_obs": np.array(observations, dtype=object),
            "error": np.array([None] * n, dtype=object),
            "attempt": np.ones(n, dtype=int),
            "cached": np.zeros(n, dtype=bool),
        }
        over = np.ones(n, dtype=bool)
        return observations, self.random.random(n), over, ~over, infos


class EpochClock(Callback):
    """Record the end time of each iteration."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.times.append(time.perf_counter())


def observation(prompt: str) -> TextObservation:
    return TextObservation(instruction=prompt, prefix=prompt, suffix="")


def save_model(folder: Path, name: str, vocabulary: int = 0) -> str:
    """Save a random Llama with the embedded model's tokenizer and return its folder.

    Unused tokens are added until there are at least `vocabulary`.
    """
    tokenizer = load_tokenizer(tiny_checkpoint())
    tokenizer.add_tokens([f"<new {n}>" for n in range(vocabulary - len(tokenizer))])
    model = random_llama(tokenizer, 0, tie_word_embeddings=True, **MODELS[name])
    save_checkpoint(folder, model, tokenizer)
    return str(folder)


def model_folder(parent: Path, name: str) -> str:
    """Return the folder of a pretrained model, or save a random one into `parent`."""
    return save_model(parent / name, name) if name in MODELS else pretrained(name)


def worked_questions(count: int) -> list[tuple[str, str]]:
    """Return different prompts of `experiment=agent` and their right answers.

    The same four worked examples stand before each question. A prompt ends without the blank that
    belongs to the answer.
    """
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("train", ["experiment=agent", "environment.group_size=1"])
        cfg.environment.num_envs = 8 * count
    observations, _ = make_environment(cfg.environment).reset(seed=0)
    prompts = list(dict.fromkeys(each["prefix"] for each in observations))[:count]
    answers = ArithmeticEnv().answers
    return [(p.rstrip(), str(answers[p.rpartition("\n")[2]])) for p in prompts]


def prompt_of(size: int, text: str = "", folder: str | None = None) -> str:
    """Return a text of `size` tokens, by the tokenizer in `folder`, that starts with `text`."""
    tokenizer = load_tokenizer(folder or tiny_checkpoint())
    while len(tokenizer(text)["input_ids"]) < size:
        text += "from sklearn.svm import SVC\n"
    while len(tokenizer(text)["input_ids"]) > size:
        text = text[:-1]
    return text


def configured(folder: str, *overrides: str) -> Any:
    """Compose the configuration of `etpo-train` for the model in `folder`, without `min_p`."""
    with initialize_config_dir(str(CONF), version_base=None):
        model = f"model.name_or_path={folder}", "model.min_p=0", "model.max_prompt_tokens=256"
        return compose("train", [*model, *overrides])


def endless(folder: str, *overrides: str) -> LanguageModelPolicy:
    """Return a policy without stop tokens and strings: all actions have the maximum length."""
    policy = instantiate(configured(folder, *overrides).model)()
    policy.stop_ids, policy.stop_strings = [], ()
    return policy


def policy_with_lora(folder: str) -> LanguageModelPolicy:
    """Return a policy with an adapter of rank 16 on all linear layers, no checkpointing."""
    lora = "model/lora=r16_all", "model.gradient_checkpointing=false"
    return endless(folder, "model=causal_lm", *lora)


class Iterations:
    """ETPO iterations with one update on one action of `new_tokens` tokens for each prompt."""

    def __init__(
        self, folder: str, prompts: Sequence[str], new_tokens: int, *overrides: str
    ) -> None:
        settings = "rollout.update_epochs=1", "algorithm.max_kl=null", *overrides
        policy = endless(folder, *overrides)
        cfg = configured(folder, f"rollout.minibatch_size={len(prompts)}", *settings)
        self.module = instantiate(cfg.algorithm, policy=lambda: policy)
        self.prompts, self.new_tokens = prompts, new_tokens

    def run(self, count: int) -> list[float]:
        """Return the seconds of `count` iterations, after one warm-up iteration."""
        size = len(self.prompts)
        data = RolloutDataModule(
            FixedPrompts(self.prompts),
            actions_per_iteration=size,
            minibatch_size=size,
            update_epochs=1,
            max_new_tokens=self.new_tokens,
            num_envs=size,
            seed=0,
        )
        data.policy_checked = True  # the check needs an untrained policy
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
        trainer.fit(self.module, datamodule=data)
        assert data.rollout is not None
        assert data.rollout.actions.action_mask.sum() == size * self.new_tokens
        return list(np.diff(clock.times))


def write(
    out: Path, name: str, rows: pd.DataFrame, table: pd.DataFrame, figure: Figure | None = None
) -> None:
    """Write NAME.csv (all measurements) and NAME.png; print the table and the machine."""
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / f"{name}.csv", index=False)
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=120)
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    print(table.to_string(index=False, float_format=lambda x: f"{x:.2f}"))
