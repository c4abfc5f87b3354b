"""What the recipes of models from nothing share: fresh weights and a checkpoint of them."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def fresh_llama(tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: Any) -> LlamaForCausalLM:
    """A Llama with four heads and float32 weights that `seed` draws; `sizes` of `LlamaConfig`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_checkpoint(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Writes tokenizer and model as a Hugging Face checkpoint, all at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as parent:
        tokenizer.save_pretrained(f"{parent}/model")
        model.save_pretrained(f"{parent}/model")
        os.replace(f"{parent}/model", folder)
