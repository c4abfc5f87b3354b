"""A randomly initialised language model whose vocabulary is that of a token MDP."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from etpo.environments.token_mdp_env import VOCABULARY_SIZES, letters
from etpo.errors import MAX_SEED, check_integer
from etpo.models.fresh import fresh_llama, save_checkpoint
from etpo.models.loading import expanded
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptTemplate

EOS = "</s>"


def letter_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """One token per letter, in the MDP's order, then the end token; nothing else.

    A prompt begins with the end token, as in GPT-2. Without it the prompt "aa" and "aa" with the
    action's first token "a" would be one and the same to a transformer with relative positions:
    attention over equal tokens cannot count them.
    """
    vocabulary = {token: i for i, token in enumerate([*letters(vocabulary_size), EOS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS)


def letter_model(vocabulary_size: int, seed: int) -> LlamaForCausalLM:
    """A Llama of two layers, 64 wide, with fresh float32 weights."""
    return fresh_llama(
        letter_tokenizer(vocabulary_size),
        seed,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        initializer_range=0.1,  # large enough that the distributions are not all uniform
    )


def save_letter_checkpoint(folder: Path, vocabulary_size: int, seed: int) -> None:
    """Writes tokenizer and model as a Hugging Face checkpoint, all at once."""
    save_checkpoint(folder, letter_model(vocabulary_size, seed), letter_tokenizer(vocabulary_size))


def letter_backbone(
    name_or_path: str,
    prompt: PromptTemplate,
    *,
    vocabulary_size: int,
    init_seed: int,
    **settings: Any,
) -> LanguageModelPolicy:
    """The policy of the checkpoint in the folder `name_or_path`, which is made if it is missing.

    vocabulary_size: the MDP's. init_seed: draws the weights, apart from the run's seed. settings:
    arguments of `LanguageModelPolicy`. Raises ConfigError for values out of range.
    """
    check_integer("model.vocabulary_size", vocabulary_size, *VOCABULARY_SIZES)
    check_integer("model.init_seed", init_seed, 0, MAX_SEED)
    folder = Path(expanded(name_or_path))
    if not folder.exists():
        save_letter_checkpoint(folder, vocabulary_size, init_seed)
    return LanguageModelPolicy(name_or_path, prompt, **settings)
