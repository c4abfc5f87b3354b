"""Save a policy as a folder that transformers, or peft, loads, and check the folder."""

from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from etpo.algorithms.policy_check import rounding
from etpo.errors import ConfigError
from etpo.models.causal_lm import last_hidden_states, trunk_of
from etpo.models.gguf_file import is_gguf
from etpo.models.policy import LanguageModelPolicy
from etpo.models.quantization import dequantised, has_float_weights


def sampling(policy: LanguageModelPolicy) -> GenerationConfig:
    """Return settings with which `generate` samples as in training."""
    padded = range(policy.vocabulary_size, policy.model.config.get_text_config().vocab_size)
    return GenerationConfig(
        do_sample=True,
        temperature=policy.temperature,
        min_p=policy.min_p or None,
        top_k=0,
        bos_token_id=policy.tokenizer.bos_token_id,
        eos_token_id=policy.stop_ids,
        pad_token_id=policy.pad_id,
        suppress_tokens=list(padded) or None,
    )


def merged(adapted: PeftModel) -> PreTrainedModel:
    """Merge the adapter into the weights; `adapted` is unusable afterwards.

    Tied input and output embeddings stay tied only if the adapter changed both alike.
    """
    model = adapted.get_base_model()
    tied = model.config.get_text_config().tie_word_embeddings
    read, write = (
        layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if tied and read.weight is write._parameters.get("weight"):
        write.weight = nn.Parameter(read.weight.detach().clone())
    model = adapted.merge_and_unload()
    read, write = model.get_input_embeddings(), model.get_output_embeddings()
    tied = tied and torch.equal(read.weight, write.weight)
    if tied:
        write.weight = read.weight
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = tied
    return model


@torch.no_grad()
def log_probs(model: nn.Module, vocabulary_size: int, ids: torch.Tensor) -> torch.Tensor:
    """Return float32 log-probabilities [B, L, V] of raw logits, over the tokenizer's tokens."""
    ids = ids.to(model.device)  # quantised weights are on a GPU
    logits = model(input_ids=ids, use_cache=False).logits[..., :vocabulary_size]
    return logits.log_softmax(-1, dtype=torch.float32).cpu()


def save_policy(policy: LanguageModelPolicy, folder: Path, merge: bool) -> None:
    """Write the model into a new `folder`; `policy` is unusable afterwards.

    Raises ConfigError if the written model has other log-probabilities, or if there is no adapter
    for merge=False.
    """
    model = policy.model
    if not merge and not isinstance(model, PeftModel):
        raise ConfigError("merge=false needs a run with model.lora; this one trained all weights")
    drawn = torch.Generator().manual_seed(0)
    size, length = policy.vocabulary_size, min(32, policy.context_size)
    ids = torch.randint(size, (1, int(length)), generator=drawn)
    with torch.no_grad():
        read = ids.to(policy.device)
        hidden = last_hidden_states(trunk_of(model), 1, input_ids=read, use_cache=False)
        limit = rounding(policy, hidden[:, 0]).cpu()
    expected = log_probs(model, size, ids)
    settings = sampling(policy)
    loading = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    if not has_float_weights(model):
        if merge:
            model = dequantised(model)
        else:
            loading["quantization_config"] = model.config.quantization_config
    if isinstance(model, PeftModel):
        base = Path(model.active_peft_config.base_model_name_or_path)
        if is_gguf(base) and not merge:  # transformers finds the file by folder and name
            base, loading["gguf_file"] = base.parent, base.name
        if base.is_dir():  # found from any working directory
            model.active_peft_config.base_model_name_or_path = str(base.absolute())
        model = merged(model) if merge else model
    model.generation_config = settings
    model.save_pretrained(folder)
    settings.save_pretrained(folder)  # peft writes the adapter alone
    policy.tokenizer.save_pretrained(folder)
    policy.model = model = None  # no two models at a time
    kind = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    again = kind.from_pretrained(folder, **loading).eval()
    distance = (log_probs(again, size, ids) - expected).abs().mean()
    if not distance <= limit:
        raise ConfigError(
            f"merge={str(merge).lower()}: log-probabilities of the folder differ from the model's "
            f"by {float(distance):.2g} on average; allowed is a model that loads as saved"
        )
