"""`etpo-export ckpt_path=... out=FOLDER`: write a checkpoint's policy as a Hugging Face folder."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from etpo.algorithms.policy_check import rounding
from etpo.checkpoints import load_checkpoint, load_weights, saved_config
from etpo.config import check_missing
from etpo.console import console_script
from etpo.errors import ConfigError, reason
from etpo.models.policy import LanguageModelPolicy


def load_policy(ckpt_path: str) -> LanguageModelPolicy:
    """Return the policy of the run that wrote `ckpt_path`, with the checkpoint's weights.

    Raises ConfigError if its run folder or its model is missing or does not fit.
    """
    state, start = load_checkpoint(ckpt_path)["state_dict"], "policy."
    weights = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    if not weights:
        raise ConfigError(f"ckpt_path={ckpt_path}: it holds no weights of a model")
    try:
        # plain lists: peft writes model.lora as JSON
        policy = instantiate(saved_config(ckpt_path, []).model, _convert_="all")()
    except OSError as error:
        raise ConfigError(
            f"ckpt_path={ckpt_path}: its model cannot be read ({reason(error)}); allowed is a run "
            "whose model is still there"
        ) from error
    load_weights(policy, weights, ckpt_path)
    return policy


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
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    return model


@torch.no_grad()
def log_probs(model: nn.Module, vocabulary_size: int, ids: torch.Tensor) -> torch.Tensor:
    """Return float32 log-probabilities [B, L, V] of raw logits, over the tokenizer's tokens."""
    logits = model(input_ids=ids, use_cache=False).logits[..., :vocabulary_size]
    return logits.log_softmax(-1, dtype=torch.float32)


def write(policy: LanguageModelPolicy, folder: Path, merge: bool) -> None:
    """Write the model into a new `folder`; `policy` is unusable afterwards.

    Raises ConfigError if the written model has other log-probabilities.
    """
    model = policy.model
    drawn = torch.Generator().manual_seed(0)
    size, length = policy.vocabulary_size, min(32, policy.context_size)
    ids = torch.randint(size, (1, int(length)), generator=drawn)
    prompt, last = ids[:, :-1], ids[:, -1:]
    limit = rounding(policy, (prompt, torch.ones_like(prompt), last))
    expected = log_probs(model, size, ids)
    settings = sampling(policy)
    dtype, attention = model.dtype, model.config._attn_implementation
    if isinstance(model, PeftModel) and merge:
        model = merged(model)
    elif isinstance(model, PeftModel):
        base = Path(model.active_peft_config.base_model_name_or_path)
        if base.is_dir():  # found from any working directory
            model.active_peft_config.base_model_name_or_path = str(base.absolute())
    model.generation_config = settings
    model.save_pretrained(folder)
    settings.save_pretrained(folder)  # peft writes the adapter alone
    policy.tokenizer.save_pretrained(folder)
    policy.model = model = None  # no two models at a time
    kind = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    again = kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    distance = (log_probs(again, size, ids) - expected).abs().mean()
    if not distance <= limit:
        raise ConfigError(
            f"merge={str(merge).lower()}: log-probabilities of the folder differ from the model's "
            f"by {float(distance):.2g} on average; allowed is a model that loads as saved"
        )


def export(cfg: DictConfig) -> Path:
    """Write the folder `cfg.out` atomically and return it."""
    check_missing(cfg)
    if not isinstance(cfg.merge, bool):
        raise ConfigError(f"merge={cfg.merge}: allowed are true, false")
    out = Path(str(cfg.out)).expanduser()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"out={cfg.out} exists; allowed is a new or an empty folder")
        policy = load_policy(str(cfg.ckpt_path))
        if not cfg.merge and not isinstance(policy.model, PeftModel):
            raise ConfigError(
                "merge=false needs a run with model.lora; this one trained all weights"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            write(policy, Path(folder) / out.name, cfg.merge)
            os.replace(Path(folder) / out.name, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"out={cfg.out}: cannot be written ({reason(error)}); allowed is a folder with room "
            "for it"
        ) from error
    return out


@console_script("export")
def main(cfg: DictConfig) -> None:
    """Console script: `etpo-export ckpt_path=... out=FOLDER [merge=false]`."""
    print(f"written: {export(cfg)}")


if __name__ == "__main__":
    main()
