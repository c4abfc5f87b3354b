"""Fixtures that several folders of tests use."""

import csv
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

from etpo.environments.text_env import TextVectorEnv

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets: `ETPO_DATA_DIR`, else `../shared/datasets`."""
    folder = Path(os.environ.get("ETPO_DATA_DIR", REPOSITORY.parent / "shared" / "datasets"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set ETPO_DATA_DIR")
    return folder


FAMILIES = {
    "llama": (LlamaConfig, []),
    "codellama": (LlamaConfig, ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]),
    "qwen": (
        Qwen2Config,
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>"],
    ),
    "qwen-instruct": (Qwen2Config, ["<|im_start|>", "<|im_end|>"]),
    "qwen3": (Qwen3Config, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    "qwen3.5": (
        partial(
            Qwen3_5TextConfig,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    ),
    "smollm2": (LlamaConfig, ["<|im_start|>", "<|im_end|>"]),
    "smollm3": (SmolLM3Config, ["<|im_start|>", "<|im_end|>"]),
    "gemma3": (Gemma3TextConfig, ["<|im_start|>", "<|im_end|>", "<end_of_turn>"]),
    "llama3": (LlamaConfig, ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]),
    "deepseek": (LlamaConfig, ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]),
    "cohere": (CohereConfig, []),  # multiplies its output layer's logits by `logit_scale`
    "starcoder": (
        Starcoder2Config,
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"],
    ),
}
CHAT_TEMPLATE = (
    "{{ date_string }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def save_checkpoint(folder: Path, family: str) -> Path:
    """A randomly initialised two-layer checkpoint of a model family, with a byte tokenizer."""
    config_class, control_tokens = FAMILIES[family]
    special = ["<s>", "</s>", "<pad>", *control_tokens]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=control_tokens,
        chat_template=CHAT_TEMPLATE if "<|im_end|>" in control_tokens else None,
    ).save_pretrained(folder)
    config = config_class(
        vocab_size=len(special) + len(alphabet) + 7,  # padded, as real checkpoints are
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """checkpoint(family): the folder of that family's small random checkpoint."""
    saved: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in saved:
            saved[family] = save_checkpoint(tmp_path_factory.mktemp(family), family)
        return saved[family]

    return get


class LetterEnv(TextVectorEnv):
    """Pays the share of the letter c in the action; an episode lasts `length` actions."""

    task_name = "letters"

    def __init__(self, num_envs: int, length: int = 3) -> None:
        self.num_envs, self.length = num_envs, length
        self.closed_count = 0

    def reset(self, *, seed=None, options=None):
        self.attempts = np.zeros(self.num_envs, dtype=int)
        return [self.first() for _ in range(self.num_envs)], {}

    def first(self):
        return {"instruction": "go", "prefix": "go", "suffix": ""}

    def step_part(self, actions, envs):
        rewards = np.array([a.count("c") / max(len(a), 4) for a in actions])
        self.attempts[envs] += 1
        attempts = self.attempts[envs]
        done = attempts >= self.length
        following = [{"instruction": "go", "prefix": f"go{a[:2]}", "suffix": ""} for a in actions]
        infos = {
            "final_obs": np.full(len(envs), None, dtype=object),
            "error": [None] * len(envs),
            "attempt": attempts,
            "cached": [False] * len(envs),
        }
        for row in np.flatnonzero(done):
            infos["final_obs"][row], following[row] = following[row], self.first()
        self.attempts[envs[done]] = 0
        return following, rewards, done, np.zeros(len(envs), dtype=bool), infos

    def close_extras(self, **kwargs):
        self.closed_count += 1


@pytest.fixture
def letter_env() -> type[LetterEnv]:
    return LetterEnv


SMALL_RUN = (
    "trainer.max_epochs=3",
    "rollout.num_envs=4",
    "rollout.actions_per_iteration=16",
    "rollout.minibatch_size=8",
    "rollout.update_epochs=1",
    "rollout.max_new_tokens=48",
    "model.temperature=0.5",  # so that programs come twice
    "environment.n_splits=1",
    "schedule_iters=3",  # also where a part of the three iterations is run
)


class Ended(NamedTuple):
    """How a command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capfd) -> Iterator[Callable[..., Ended]]:
    """command(main, *arguments): runs a console script's `main` in this process."""
    log = logging.getLogger("etpo")
    before = log.propagate, log.level, torch.are_deterministic_algorithms_enabled()

    def call(main: Callable[[], None], *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
        except SystemExit as end:
            return Ended(end.code or 0, *capfd.readouterr())
        return Ended(0, *capfd.readouterr())

    yield call
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    log.propagate, log.level = before[:2]
    torch.use_deterministic_algorithms(before[2])


@pytest.fixture(scope="session")
def start_train() -> Callable[..., subprocess.Popen]:
    """start_train(cwd, *arguments): the console script `etpo-train`, as leader of its own group."""

    def start(cwd: Path, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [Path(sys.executable).with_name("etpo-train"), *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


class FinishedRun(NamedTuple):
    """A run that was not interrupted: its folder and what it printed."""

    folder: Path
    out: str


@pytest.fixture(scope="session")
def finished_run(start_train, tmp_path_factory) -> FinishedRun:
    """The console script with SMALL_RUN, in a working folder that is not the repository's."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    process = start_train(cwd, *SMALL_RUN)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder,) = (cwd / "logs" / "train" / "runs").iterdir()
    return FinishedRun(folder, out)


@pytest.fixture(scope="session")
def small_run() -> tuple[str, ...]:
    return SMALL_RUN


@pytest.fixture(scope="session")
def repeatable() -> Callable[[Path], tuple[list[dict[str, str]], str]]:
    """repeatable(folder): what a run's seed decides.

    The rows of `metrics.csv`, as they are written, without the `time/` columns, and the text of
    `episodes.jsonl`.
    """

    def read(folder: Path) -> tuple[list[dict[str, str]], str]:
        with (folder / "metrics.csv").open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
        return rows, (folder / "episodes.jsonl").read_text()

    return read


@pytest.fixture(scope="session")
def assert_same_run(repeatable) -> Callable[[Path, Path], None]:
    """assert_same_run(folder, other): the same metrics, episodes and weights, to the last bit."""

    def compare(folder: Path, other: Path) -> None:
        (rows, episodes), (other_rows, other_episodes) = repeatable(folder), repeatable(other)
        assert rows == other_rows
        assert episodes == other_episodes
        weights, other_weights = (
            torch.load(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (folder, other)
        )
        assert any(name.startswith("policy.model.") for name in weights)
        assert weights.keys() == other_weights.keys()
        for name in weights:
            assert torch.equal(weights[name], other_weights[name]), name

    return compare
