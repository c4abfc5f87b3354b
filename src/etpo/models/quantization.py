"""Quantised base weights under an adapter: QLoRA (Dettmers et al., arXiv 2305.14314)."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import BitsAndBytesConfig

from etpo.errors import ConfigError
from etpo.models.gguf_file import is_gguf


def check_quantization(
    quantization: str | None, name_or_path: str, lora: dict[str, Any] | None
) -> None:
    """Raise ConfigError if the model cannot be trained with `model.quantization`.

    On a CPU bitsandbytes rounds to bfloat16 and computes no gradients in evaluation mode, which is
    the policy's.
    """
    key = f"model.quantization={quantization}"
    if quantization not in (None, "nf4"):
        raise ConfigError(f"{key}: allowed are null, nf4")
    if quantization is None:
        return
    if lora is None:
        raise ConfigError(f"{key}: allowed with model.lora=null is null; nf4 needs model/lora=r16")
    if is_gguf(name_or_path):
        raise ConfigError(f"{key}: allowed with a GGUF file, which is dequantised, is null")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{key}: allowed is null, since the package bitsandbytes is missing: "
            "pip install 'etpo[quantization]'"
        )
    if gpu() is None:
        raise ConfigError(f"{key}: allowed without a CUDA GPU is null")


def gpu() -> str | None:
    """Return the GPU of this process, or None without one."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None


def quantization_settings(quantization: str | None, dtype: str) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` quantises the linear layers.

    nf4: 4-bit NormalFloat with quantised scales; products are computed in `dtype`. The output layer
    and embeddings keep `dtype`.
    """
    if quantization is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": gpu()}}


def has_float_weights(module: nn.Module) -> bool:
    """Return whether all parameters can be trained."""
    return all(parameter.is_floating_point() for parameter in module.parameters())


def dequantised(adapted: PeftModel) -> PeftModel:
    """Return the adapter on the dequantised base model; `adapted` is unusable afterwards."""
    config, state = adapted.active_peft_config, get_peft_model_state_dict(adapted)
    model = get_peft_model(adapted.unload().dequantize(), config)
    set_peft_model_state_dict(model, state)
    return model
