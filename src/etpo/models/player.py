"""A small language model made for one text game: it knows the game's texts and plays at random.

The tokenizer is fitted to observations of random play, so that a line that is always the same is
one token, and the weights to moves that are drawn uniformly. What it plays better than that, it has
learned by reinforcement.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from etpo.environments.text_env import TextVectorEnv
from etpo.errors import MAX_SEED, ConfigError, check_integer
from etpo.models.fresh import fresh_llama, save_checkpoint
from etpo.models.loading import expanded
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptTemplate

EOS = "</s>"
ROUNDS = 40  # of random play
STEPS, BATCH = 150, 32  # of fitting


def random_play(
    environment: TextVectorEnv, moves: Sequence[str], rounds: int, seed: int
) -> list[str]:
    """The prefixes that are seen where every move is drawn uniformly."""
    random = np.random.default_rng(seed)
    observations, _ = environment.reset(seed=seed)
    seen = [o["prefix"] for o in observations]
    for _ in range(rounds):
        observations, *_ = environment.step(list(random.choice(moves, environment.num_envs)))
        seen += [o["prefix"] for o in observations]
    return seen


def line_tokenizer(
    texts: Sequence[str], moves: Sequence[str], vocabulary_size: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE within lines; every move is one token, in prompts too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(moves),
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(moves))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS)


def fit_random_player(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    moves: Sequence[str],
    seed: int,
) -> None:
    """Fits the model to moves drawn uniformly, each followed by the end token."""
    random = np.random.default_rng(seed)
    eos = tokenizer.eos_token_id
    move_ids = tokenizer.convert_tokens_to_ids(list(moves))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        chosen = random.choice(len(texts), BATCH)
        rows = [
            [*tokenizer(texts[i])["input_ids"], int(random.choice(move_ids)), eos] for i in chosen
        ]
        width = max(map(len, rows))
        ids = torch.full((BATCH, width), eos)
        labels = torch.full((BATCH, width), -100)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, len(tokens) - 2 : len(tokens)] = torch.tensor(tokens[-2:])
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


def player_backbone(
    name_or_path: str,
    prompt: PromptTemplate,
    *,
    environment: TextVectorEnv,
    moves: Sequence[str],
    vocabulary_size: int,
    hidden_size: int,
    num_layers: int,
    init_seed: int,
    **settings: Any,
) -> LanguageModelPolicy:
    """The policy of the checkpoint in the folder `name_or_path`, which is made if it is missing.

    environment: the game, which is closed here. moves: the texts that it plays, at least two.
    vocabulary_size: tokens in all. hidden_size: a multiple of 8, for four heads of even size.
    init_seed: draws play and weights, apart from the run's seed. settings: arguments of
    `LanguageModelPolicy`. Raises ConfigError for values out of range.
    """
    moves = list(moves)
    if len(set(moves)) < 2 or not all(isinstance(m, str) and m for m in moves):
        raise ConfigError(f"model.moves={moves}: allowed are two different texts or more")
    check_integer("model.vocabulary_size", vocabulary_size, 300 + len(moves))
    check_integer("model.hidden_size", hidden_size, 8)
    if hidden_size % 8:
        raise ConfigError(f"model.hidden_size={hidden_size}: allowed are multiples of 8")
    check_integer("model.num_layers", num_layers, 1)
    check_integer("model.init_seed", init_seed, 0, MAX_SEED)
    folder = Path(expanded(name_or_path))
    if not folder.exists():
        texts = random_play(environment, moves, ROUNDS, init_seed)
        tokenizer = line_tokenizer(texts, moves, vocabulary_size)
        sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
        model = fresh_llama(tokenizer, init_seed, num_hidden_layers=num_layers, **sizes)
        fit_random_player(model, tokenizer, texts, moves, init_seed)
        save_checkpoint(folder, model, tokenizer)
    environment.close()  # the run has one of its own
    return LanguageModelPolicy(name_or_path, prompt, **settings)
