"""A randomly initialised language model of the credit suite with a uniform output distribution."""

from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from etpo.errors import MAX_SEED, check_integer
from etpo.models.loading import expanded
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptTemplate
from etpo_tasks.credit_suite import MAX_LENGTH, MAX_LETTERS, MAX_NOISE_BITS, MAX_TURNS
from etpo_tasks.random_init import save_checkpoint

EOS = "</s>"
# learned positions: the number of letters so far is known at every token
SIZES = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": MAX_LENGTH + MAX_NOISE_BITS + 12}


def suite_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per letter, bit and word of the suite's observations."""
    words = [EOS, *ascii_lowercase[:MAX_LETTERS], *digits, "open", "lost", "earned"]
    words += [f"turn{turn}" for turn in range(MAX_TURNS)]
    words += [f"cue{cue}" for cue in range(MAX_LETTERS)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    pattern = Regex(rf"turn\d+|cue\d+|earned|open|lost|[0-9a-{ascii_lowercase[MAX_LETTERS - 1]}]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    tokenizer.decoder = decoders.ByteLevel()  # the words are ASCII; llguidance needs the type
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS)


def uniform_gpt2(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """Return a float32 GPT-2 with weights drawn by `seed` and an output layer of zeros."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        dtype="float32",
        **SIZES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def build_credit_lm(
    name_or_path: str, prompt: PromptTemplate, *, init_seed: int, **settings: Any
) -> LanguageModelPolicy:
    """Return the policy of the checkpoint in the folder `name_or_path`; create it if missing.

    The reference is uniform over the letters that the grammar admits. `init_seed` draws the
    weights, independently of the run's seed. `settings` are arguments of `LanguageModelPolicy`.
    Raises ConfigError if a value is out of range.
    """
    check_integer("model.init_seed", init_seed, 0, MAX_SEED)
    folder = Path(expanded(name_or_path))
    if not folder.exists():
        tokenizer = suite_tokenizer()
        save_checkpoint(folder, uniform_gpt2(tokenizer, init_seed), tokenizer)
    return LanguageModelPolicy(name_or_path, prompt, **settings)
