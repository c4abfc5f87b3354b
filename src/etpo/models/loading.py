"""Load tokenizer and causal LM, or raise a ConfigError with the reason."""

import json
import os
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
from etpo.models import gguf_file
from etpo.models.quantization import quantization_settings
from etpo.pretrained import HUB_IDS

ALLOWED = {
    "dtype": ("float32", "bfloat16", "float16"),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2"),
}
ADAPTER = (
    "it is an adapter of peft; allowed is a whole model, such as its base model after "
    "merge_and_unload() and save_pretrained()"
)
LFS_POINTER = b"version https://git-lfs.github.com"
# never run the code of a checkpoint, and do not ask for permission
TRUST = {"trust_remote_code": False}


def expanded(name_or_path: str) -> str:
    """Return the name with a leading `~` replaced by the home folder."""
    return os.path.expanduser(name_or_path) if isinstance(name_or_path, str) else name_or_path


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a causal LM."""
    check_model_path(name_or_path)
    with refused(name_or_path), gguf_file.location(name_or_path) as location:
        tokenizer = AutoTokenizer.from_pretrained(**location, **TRUST)
    tokenizer.name_or_path = name_or_path
    return tokenizer


def load_model(
    name_or_path: str, dtype: str, attn_implementation: str, quantization: str | None = None
) -> PreTrainedModel:
    """Load a causal LM with all its weights, quantised by `model.quantization`.

    Raises:
        ConfigError: there is none, weights are missing, have other shapes or are quantised, or
            the model does not know `attn_implementation`.
    """
    settings = {"dtype": dtype, "attn_implementation": attn_implementation}
    for key, value in settings.items():
        if value not in ALLOWED[key]:
            raise ConfigError(f"model.{key}={value}: allowed are {', '.join(ALLOWED[key])}")
    check_attention(check_model_path(name_or_path), attn_implementation)
    with refused(name_or_path), gguf_file.location(name_or_path) as location:
        model, found = AutoModelForCausalLM.from_pretrained(
            **location,
            **settings,
            **gguf_file.dequantisation(name_or_path),
            **quantization_settings(quantization, dtype),
            ignore_mismatched_sizes=True,  # `check_weights` names them
            output_loading_info=True,
            **TRUST,
        )
    model.name_or_path = model.config.name_or_path = name_or_path  # of a GGUF file: its link
    if getattr(model, "is_quantized", False) and quantization is None:
        method = model.config.quantization_config.quant_method
        raise ConfigError(
            f"model.name_or_path={name_or_path}: its weights are quantised ({method}); allowed are "
            "float weights"
        )
    check_weights(name_or_path, model, found)
    return model


def check_weights(name_or_path: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise ConfigError unless the files hold all weights; warn of unused ones."""
    key = f"model.name_or_path={name_or_path}"
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
            f"{key}: its files have {name} as {list(saved)}, its config.json has {list(expected)}"
        )
    if unread:
        unused = f"{key}: its files have {some(unread)}, which the model leaves out"
        warnings.warn(unused, stacklevel=2)


def some(names: list[str]) -> str:
    """Name the first weight and the number of others."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more weights"


def check_model_path(name_or_path: str) -> PreTrainedConfig:
    """Return the configuration of a causal LM; raise ConfigError if there is none."""
    key = f"model.name_or_path={name_or_path}"
    if not isinstance(name_or_path, str) or not name_or_path:
        raise ConfigError(f"{key}: allowed are a hub id, a folder or a GGUF file")
    if (Path(name_or_path) / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{key}: {ADAPTER}")
    gguf_file.check_gguf(name_or_path)
    with refused(name_or_path), gguf_file.location(name_or_path) as location:
        config = AutoConfig.from_pretrained(**location, **TRUST)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ConfigError(
            f"{key}: a model of type {config.model_type} is no causal language model of "
            "transformers; allowed are those that AutoModelForCausalLM loads, with a decoder alone"
        )
    return config


def check_attention(config: PreTrainedConfig, attn_implementation: str) -> None:
    """Raise ConfigError if a model of this configuration supports eager attention only."""
    faults = []
    for kind in (attn_implementation, "eager"):
        try:
            with torch.device("meta"), quiet():  # without memory for the weights
                AutoModelForCausalLM.from_config(config, attn_implementation=kind, **TRUST)
            break
        except Exception as error:  # ValueError, ImportError, and others of kernels
            faults.append(reason(error))
    if len(faults) == 1:  # otherwise loading reports what is wrong
        raise ConfigError(
            f"model.attn_implementation={attn_implementation}: allowed with a model of type "
            f"{config.model_type} is eager ({faults[0]})"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log of transformers; `check_weights` reports missing weights."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def refused(name_or_path: str) -> Iterator[None]:
    """Turn any exception while configuration, tokenizer or weights are read into a ConfigError."""
    try:
        with quiet():
            yield
    except Exception as error:  # of transformers, tokenizers, safetensors, torch, json, ...
        hint = ""
        if name_or_path in HUB_IDS.values():
            hint = "; `make pretrained` (python -m etpo.pretrained) fetches it"
        raise ConfigError(
            f"model.name_or_path={name_or_path}: not a causal language model that can be loaded; "
            "allowed are a hub id or a folder with config.json, weights and tokenizer, or a GGUF "
            f"file ({damage(Path(name_or_path)) or reason(error)}){hint}"
        ) from error


def damage(path: Path) -> str | None:
    """Return the name and the fault of a damaged GGUF file or file of a folder, or None."""
    read = (".safetensors", ".bin", ".json", ".model")
    files = sorted(file for file in path.glob("*") if file.suffix in read)
    for file in filter(Path.is_file, [path] if gguf_file.is_gguf(path) else files):
        with file.open("rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file.name} is a pointer of Git LFS: `git lfs pull` fetches the file"
        try:
            if file.suffix == ".safetensors":
                safe_open(file, "pt").__enter__()
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            if gguf_file.is_gguf(file):
                gguf_file.check_readable(file)
        except (SafetensorError, ValueError) as error:
            return f"{file.name} is damaged or cut off: {reason(error)}"
    return None
