"""Loads tokenizer and causal LM of a hub id or folder; ConfigError names what prevents it."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from etpo.errors import ConfigError, reason

LFS_POINTER = b"version https://git-lfs.github.com"
# never run the code of a checkpoint, and do not ask for permission
TRUST = {"trust_remote_code": False}


def expanded(name_or_path: str) -> str:
    """The name with a leading `~` as the home folder."""
    return (
        str(Path(name_or_path).expanduser()) if str(name_or_path).startswith("~") else name_or_path
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder of a causal LM; ConfigError where there is none."""
    check_model_path(name_or_path)
    with refused(name_or_path):
        return AutoTokenizer.from_pretrained(name_or_path, **TRUST)


def load_model(name_or_path: str, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """The causal LM of a hub id or folder, every weight of it read from there.

    Raises ConfigError where there is none, where weights are missing, have other shapes or are
    quantised, and where the model does not know `attn_implementation`.
    """
    check_attention(check_model_path(name_or_path), attn_implementation)
    with refused(name_or_path):
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **TRUST,
        )
    check_weights(name_or_path, model, found)
    return model


def check_weights(name_or_path: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raises ConfigError unless the files hold all weights as floats; warns of unused ones."""
    key = f"model.name_or_path={name_or_path}"
    if getattr(model, "is_quantized", False):
        method = model.config.quantization_config.quant_method
        raise ConfigError(f"{key}: its weights are quantised ({method}); allowed are float weights")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(f"{key}: {ADAPTER}")
    missing, unread = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        other = f"; it has {some(unread)}" if unread else ""
        raise ConfigError(
            f"{key}: its files lack {some(missing)} of the {model.config.model_type} model that "
            f"config.json describes{other}"
        )
    if found["mismatched_keys"]:
        name, saved, expected = sorted(found["mismatched_keys"])[0]
        raise ConfigError(
            f"{key}: its files have {name} as {list(saved)}, its config.json says {list(expected)}"
        )
    if unread:
        warnings.warn(
            f"{key}: its files have {some(unread)}, which the model leaves out", stacklevel=2
        )


def some(names: list[str]) -> str:
    """The first of `names`, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more weights"


def check_model_path(name_or_path: str) -> PreTrainedConfig:
    """The configuration of the causal LM at `name_or_path`; ConfigError where there is none."""
    key = f"model.name_or_path={name_or_path}"
    if not isinstance(name_or_path, str) or not name_or_path:
        raise ConfigError(f"{key}: allowed are a hub id or a folder")
    folder = Path(name_or_path)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{key}: {ADAPTER}")
    with refused(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path, **TRUST)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ConfigError(
            f"{key}: a model of type {config.model_type} is no causal language model of "
            "transformers; allowed are those that AutoModelForCausalLM loads, with a decoder alone"
        )
    return config


ADAPTER = (
    "it is an adapter of peft; allowed is a whole model, such as its base model after "
    "merge_and_unload() and save_pretrained()"
)


def check_attention(config: PreTrainedConfig, attn_implementation: str) -> None:
    """Raises ConfigError where a model of this configuration attends otherwise only."""
    try:
        empty_model(config, attn_implementation)
    except (
        Exception
    ) as error:  # transformers raises ValueError and ImportError, and its kernels others
        if attn_implementation == "eager":
            return  # loading will say what is wrong
        try:
            empty_model(config, "eager")
        except Exception:
            return
        raise ConfigError(
            f"model.attn_implementation={attn_implementation}: allowed with a model of type "
            f"{config.model_type} is eager ({reason(error)})"
        ) from error


def empty_model(config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=attn_implementation, **TRUST
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the log of transformers while it loads; `check_weights` reports missing weights."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def refused(name_or_path: str) -> Iterator[None]:
    """Turns whatever a reader of configuration, tokenizer or weights raises into a ConfigError."""
    try:
        with quiet():
            yield
    except Exception as error:  # of transformers, tokenizers, safetensors, torch, json, ...
        raise ConfigError(
            f"model.name_or_path={name_or_path}: not a causal language model that can be loaded; "
            "allowed are a hub id or a folder with config.json, weights and tokenizer "
            f"({damage(Path(name_or_path)) or reason(error)})"
        ) from error


def damage(folder: Path) -> str | None:
    """What is wrong with a file of a folder, where that is to be seen without a model."""
    for file in sorted(folder.glob("*")):
        if file.suffix not in (".safetensors", ".bin", ".json", ".model") or not file.is_file():
            continue
        with file.open("rb") as content:
            start = content.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            return f"{file.name} is a pointer of Git LFS: `git lfs pull` fetches the file"
        try:
            if file.suffix == ".safetensors":
                safe_open(file, "pt").__enter__()
            if file.suffix == ".json":
                json.loads(file.read_bytes())
        except (SafetensorError, ValueError) as error:
            return f"{file.name} is damaged or cut off: {reason(error)}"
    return None
