"""A randomly initialised character-level language model for token MDPs."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from etpo.errors import MAX_SEED, check_integer
from etpo.models.loading import expanded
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptTemplate
from etpo_tasks.random_init import random_llama, save_checkpoint
from etpo_tasks.token_mdp_env import VOCABULARY_SIZES, letters

EOS = "</s>"


def char_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per letter, in the order of the MDP, and EOS as last token.

    Prompts start with EOS, as in GPT-2. Without EOS the prompt "aa" and the prompt with the action
    token "a" have the same hidden state: relative positions cannot count equal tokens.
    """
    vocabulary = {token: i for i, token in enumerate([*letters(vocabulary_size), EOS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS)


def build_char_lm(
    name_or_path: str, prompt: PromptTemplate, *, vocabulary_size: int, init_seed: int, **extra: Any
) -> LanguageModelPolicy:
    """Return the policy of the checkpoint in the folder `name_or_path`; create it if missing.

    `vocabulary_size` includes EOS. `init_seed` draws the weights, independently of the run's seed.
    `extra` are arguments of `LanguageModelPolicy`. Raises ConfigError if a value is out of range.
    """
    check_integer("model.vocabulary_size", vocabulary_size, *VOCABULARY_SIZES)
    check_integer("model.init_seed", init_seed, 0, MAX_SEED)
    folder = Path(expanded(name_or_path))
    if not folder.exists():
        tokenizer = char_tokenizer(vocabulary_size)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes["initializer_range"] = 0.1  # large enough for non-uniform distributions
        save_checkpoint(folder, random_llama(tokenizer, init_seed, **sizes), tokenizer)
    return LanguageModelPolicy(name_or_path, prompt, **extra)
