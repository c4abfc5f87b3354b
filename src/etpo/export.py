"""`etpo-export ckpt_path=... out=FOLDER`: a checkpoint's policy as a Hugging Face folder."""

import sys
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import PeftModel
from transformers import GenerationConfig

from etpo.config import (
    CONF,
    check_missing,
    check_overrides,
    checkpoint_file,
    exit_on_bad_input,
    load_checkpoint,
)
from etpo.errors import ConfigError
from etpo.evaluate import load_weights, saved_config
from etpo.models.backbone import Backbone
from etpo.train import quiet

PREFIX = "backbone."


def load_backbone(ckpt_path: str) -> Backbone:
    """The backbone of the run that wrote `ckpt_path`, with the checkpoint's weights.

    Raises ConfigError where its run folder or its model is missing or another one.
    """
    state = load_checkpoint(ckpt_path)["state_dict"]
    run = saved_config(ckpt_path, [])
    run.paths.output_dir = str(checkpoint_file(ckpt_path).parent.parent)
    # plain lists: peft writes model.lora as JSON
    backbone = instantiate(run.model, _convert_="all")()
    policy = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    if not policy:
        raise ConfigError(f"ckpt_path={ckpt_path}: it holds no weights of a policy")
    load_weights(backbone, policy, ckpt_path)
    return backbone


def sampling(backbone: Backbone) -> GenerationConfig:
    """Settings with which `generate` samples from the policy that was trained."""
    return GenerationConfig(
        do_sample=True,
        temperature=backbone.temperature,
        min_p=backbone.min_p or None,
        top_k=0,
        eos_token_id=backbone.stop_ids,
        pad_token_id=backbone.pad_id,
    )


def export(cfg: DictConfig) -> Path:
    """Writes the folder `cfg.out` and returns it."""
    check_missing(cfg)
    if not isinstance(cfg.merge, bool):
        raise ConfigError(f"merge={cfg.merge}: allowed are true, false")
    out = Path(str(cfg.out)).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={cfg.out} exists; allowed is a new or an empty folder")
    backbone = load_backbone(str(cfg.ckpt_path))
    policy = backbone.policy
    if isinstance(policy, PeftModel):
        policy = policy.merge_and_unload() if cfg.merge else policy
    elif not cfg.merge:
        raise ConfigError("merge=false needs a run with model.lora; this one trained all weights")
    policy.generation_config = sampling(backbone)
    policy.save_pretrained(out)
    policy.generation_config.save_pretrained(out)  # peft writes the adapter alone
    backbone.tokenizer.save_pretrained(out)
    return out


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
