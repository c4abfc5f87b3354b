"""A small language model, pretrained on random play of one text game."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from etpo.environments.text_env import TextVectorEnv
from etpo.errors import MAX_SEED, ConfigError, check_integer
from etpo.models.loading import expanded
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptTemplate
from etpo_tasks.random_init import random_llama, save_checkpoint

EOS = "</s>"
VOCABULARY_SIZE = 1024
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
ROUNDS, STEPS, BATCH = 40, 150, 32  # steps of random play, optimizer steps, batch size


def random_play(env: TextVectorEnv, moves: Sequence[str], rounds: int, seed: int) -> list[str]:
    """Return the observed prefixes of `rounds` steps with uniformly random moves."""
    random = np.random.default_rng(seed)
    observations, _ = env.reset(seed=seed)
    seen = [*observations]
    for _ in range(rounds):
        seen += env.step(list(random.choice(moves, env.num_envs)))[0]
    return [o["prefix"] for o in seen]


def line_tokenizer(texts: Sequence[str], moves: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that can merge a whole line; each move is one token."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lines = pre_tokenizers.Split("\n", "merged_with_previous")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(moves),
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(moves))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS)


def pretrain_on_random_moves(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    moves: Sequence[str],
    seed: int,
) -> None:
    """Train the model to continue every text with a uniformly random move and EOS."""
    random = np.random.default_rng(seed)
    eos = tokenizer.eos_token_id
    move_ids = tokenizer.convert_tokens_to_ids(list(moves))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        prompts = [tokenizer(texts[i])["input_ids"] for i in random.choice(len(texts), BATCH)]
        rows = [torch.tensor([*p, int(random.choice(move_ids)), eos]) for p in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=eos)
        labels = [torch.cat([torch.full_like(row[:-2], -100), row[-2:]]) for row in rows]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


def build_game_lm(
    name_or_path: str,
    prompt: PromptTemplate,
    *,
    environment: TextVectorEnv,
    moves: Sequence[str],
    init_seed: int,
    **settings: Any,
) -> LanguageModelPolicy:
    """Return the policy of the checkpoint in the folder `name_or_path`; create it if missing.

    `environment` is the game and is closed; `moves` are the texts of its moves. `init_seed` draws
    random play and weights, independently of the run's seed. `settings` are arguments of
    `LanguageModelPolicy`. Raises ConfigError if a value is out of range.
    """
    moves = list(moves)
    if len(set(moves)) < 2 or not all(isinstance(m, str) and m for m in moves):
        raise ConfigError(f"model.moves={moves}: allowed are two different texts or more")
    check_integer("model.init_seed", init_seed, 0, MAX_SEED)
    folder = Path(expanded(name_or_path))
    if not folder.exists():
        texts = random_play(environment, moves, ROUNDS, init_seed)
        tokenizer = line_tokenizer(texts, moves)
        model = random_llama(tokenizer, init_seed, **SIZES)
        pretrain_on_random_moves(model, tokenizer, texts, moves, init_seed)
        save_checkpoint(folder, model, tokenizer)
    environment.close()  # the run creates another copy
    return LanguageModelPolicy(name_or_path, prompt, **settings)
