"""`etpo-evaluate ckpt_path=...`: greedy and sampled programs of a checkpoint on held-out rows."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torch import nn

from etpo.algorithms.etpo import ETPO
from etpo.config import (
    CONF,
    check_missing,
    check_overrides,
    exit_on_bad_input,
    load_checkpoint,
)
from etpo.environments.text_env import TextVectorEnv
from etpo.errors import MAX_SEED, ConfigError, check_integer
from etpo.models.backbone import Backbone
from etpo.rollout.sampler import action_texts, sample
from etpo.train import quiet


def saved_config(ckpt_path: str, overrides: list[str]) -> DictConfig:
    """The configuration of the run that wrote `ckpt_path`, with `overrides` on top.

    Raises ConfigError where the run folder's `.hydra/config.yaml` is missing.
    """
    config = Path(ckpt_path).absolute().parent.parent / ".hydra" / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"ckpt_path={ckpt_path}: its run folder lacks {config.name} ({config})")
    cfg = OmegaConf.load(config)
    OmegaConf.set_struct(cfg, True)
    try:
        cfg.merge_with_dotlist(overrides)
    except OmegaConfBaseException as error:
        raise ConfigError(f"overrides={overrides}: {str(error).splitlines()[0]}") from error
    return cfg


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], ckpt_path: str) -> None:
    """Loads what training changed; ConfigError where `state` is that of another model."""
    try:
        strange = module.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ConfigError(f"ckpt_path={ckpt_path}: its weights have other shapes") from error
    if strange:
        raise ConfigError(f"ckpt_path={ckpt_path}: the model has no weight {strange[0]}")


def first_attempts(
    backbone: Backbone,
    environment: TextVectorEnv,
    count: int,
    max_new_tokens: int,
    generator: torch.Generator | None,
) -> list[str]:
    """`count` answers to the environment's first prompt; greedy where `generator` is None."""
    observations, _ = environment.reset(seed=0)
    prompts = backbone.encode([observations[0]] * count)
    taken = sample(backbone, prompts, max_new_tokens, generator)
    return action_texts(backbone, prompts, taken)


def score_table(
    actions: list[str], score: Callable[[list[str]], list[Any]], held_out: list[Any] | None
) -> dict[str, Any]:
    """Means of reward and held-out score; failures count -1, as in a reward."""
    rewards = [s.reward for s in score(actions)]
    return {
        "actions": len(actions),
        "valid_rate": fmean(r > -1 for r in rewards),
        "mean_reward": fmean(rewards),
        "held_out_auc": None if held_out is None else fmean(s.reward for s in held_out),
    }


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Greedy and sampled first attempts of a checkpoint, scored on reward and held-out rows."""
    check_missing(cfg)
    check_integer("samples", cfg.samples, 1)
    check_integer("seed", cfg.seed, 0, MAX_SEED)
    if not OmegaConf.is_list(cfg.overrides):
        raise ConfigError(f"overrides={cfg.overrides}: allowed is a list, ['key=value', ...]")
    state = load_checkpoint(cfg.ckpt_path)["state_dict"]
    run = saved_config(str(cfg.ckpt_path), [str(override) for override in cfg.overrides])
    run.paths.output_dir = cfg.paths.output_dir
    environment = instantiate(run.environment)
    module: ETPO = instantiate(run.algorithm, backbone=instantiate(run.model))
    load_weights(module, state, cfg.ckpt_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.backbone.to(device)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    limit = run.rollout.max_new_tokens
    result: dict[str, Any] = {"ckpt_path": str(cfg.ckpt_path), "dataset": environment.dataset.name}
    mixed = torch.autocast(device.type, torch.bfloat16, run.trainer.precision == "bf16-mixed")
    try:
        for name, count, source in (("greedy", 1, None), ("sampled", cfg.samples, generator)):
            with mixed:
                actions = first_attempts(module.backbone, environment, count, limit, source)
            programs = [environment.program_from_action(action) for action in actions]
            held_out = environment.held_out(programs)
            result[name] = score_table(programs, environment.scorer.score, held_out)
            if name == "greedy":
                result["greedy_program"] = programs[0]
    finally:
        environment.close()
    return result


def report(result: dict[str, Any], folder: Path) -> None:
    """Prints the table and writes `evaluation.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    table = Table(title=f"{result['dataset']}: {result['ckpt_path']}")
    for column in ("policy", "programs", "valid", "mean reward", "held-out ROC AUC"):
        table.add_column(column)
    for name in ("greedy", "sampled"):
        row = result[name]
        held_out = "-" if row["held_out_auc"] is None else f"{row['held_out_auc']:.4f}"
        cells = (f"{row['valid_rate']:.0%}", f"{row['mean_reward']:.4f}", held_out)
        table.add_row(name, str(row["actions"]), *cells)
    console = Console()
    console.print(table)
    console.print(result["greedy_program"], highlight=False, markup=False)
    console.print(f"written: {folder / 'evaluation.json'}", soft_wrap=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def hydra_main(cfg: DictConfig) -> None:
    quiet()
    with exit_on_bad_input():
        report(evaluate(cfg), Path(cfg.paths.output_dir))


def main() -> None:
    """Console script: `etpo-evaluate ckpt_path=... [key=value ...]`."""
    with exit_on_bad_input():
        check_overrides("evaluate", sys.argv[1:])
    hydra_main()


if __name__ == "__main__":
    main()
