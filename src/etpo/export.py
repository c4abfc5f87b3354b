"""`etpo-export ckpt_path=... out=FOLDER`: a checkpoint's policy as a Hugging Face folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from etpo.algorithms.policy_check import rounding
from etpo.config import (
    CONF,
    check_missing,
    check_overrides,
    exit_on_bad_input,
    load_checkpoint,
)
from etpo.errors import ConfigError, reason
from etpo.evaluate import load_weights, saved_config
from etpo.models.policy import LanguageModelPolicy
from etpo.train import quiet

PREFIX = "policy."


def load_policy(ckpt_path: str) -> LanguageModelPolicy:
    """The policy of the run that wrote `ckpt_path`, with the checkpoint's weights.

    Raises ConfigError where its run folder or its model is missing or another one.
    """
    state = load_checkpoint(ckpt_path)["state_dict"]
    run = saved_config(ckpt_path, [])
    # plain lists: peft writes model.lora as JSON
    policy = instantiate(run.model, _convert_="all")()
    model = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    if not model:
        raise ConfigError(f"ckpt_path={ckpt_path}: it holds no weights of a model")
    load_weights(policy, model, ckpt_path)
    return policy


def sampling(policy: LanguageModelPolicy) -> GenerationConfig:
    """Settings with which `generate` samples from the model that was trained."""
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
    """The model with its adapter in the weights; `adapted` is of no use afterwards.

    Input and output embeddings that were tied stay so only where the adapter changed both alike.
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
    """float32 log-probabilities [B, L, V] of raw logits, over the tokenizer's tokens."""
    logits = model(input_ids=ids, use_cache=False).logits[..., :vocabulary_size]
    return logits.log_softmax(-1, dtype=torch.float32)


def write(policy: LanguageModelPolicy, folder: Path, merge: bool) -> None:
    """Writes the model into a new `folder`; `policy` is of no use afterwards.

    Raises ConfigError where its log-probabilities cannot be had from what was written.
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
        config = model.active_peft_config
        base = Path(config.base_model_name_or_path)
        if base.is_dir():  # found from any working directory
            config.base_model_name_or_path = str(base.absolute())
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
            f"by {float(distance):.2g} on average; allowed is what transformers can load as it was"
        )


def export(cfg: DictConfig) -> Path:
    """Writes the folder `cfg.out`, all at once, and returns it."""
    check_missing(cfg)
    if not isinstance(cfg.merge, bool):
        raise ConfigError(f"merge={cfg.merge}: allowed are true, false")
    out = Path(str(cfg.out)).expanduser()
    with output_errors(cfg.out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"out={cfg.out} exists; allowed is a new or an empty folder")
    try:
        policy = load_policy(str(cfg.ckpt_path))
    except OSError as error:
        raise ConfigError(
            f"ckpt_path={cfg.ckpt_path}: its model cannot be read ({reason(error)}); allowed is a "
            "run whose model is still there"
        ) from error
    if not cfg.merge and not isinstance(policy.model, PeftModel):
        raise ConfigError("merge=false needs a run with model.lora; this one trained all weights")
    with output_errors(cfg.out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            write(policy, Path(folder) / out.name, cfg.merge)
            os.replace(Path(folder) / out.name, out)
    return out


@contextmanager
def output_errors(out: str) -> Iterator[None]:
    """Raises ConfigError with the key `out` for an error of the operating system."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"out={out}: cannot be written ({reason(error)}); allowed is a folder with room for it"
        ) from error


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="export")
def hydra_main(cfg: DictConfig) -> None:
    quiet()
    with exit_on_bad_input():
        print(f"written: {export(cfg)}")


def main() -> None:
    """Console script: `etpo-export ckpt_path=... out=FOLDER [merge=false]`."""
    with exit_on_bad_input():
        check_overrides("export", sys.argv[1:])
    hydra_main()


if __name__ == "__main__":
    main()
