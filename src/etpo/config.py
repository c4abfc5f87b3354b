"""The configuration folder, its resolvers, renamed keys, and checks that no constructor makes."""

import hashlib
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from etpo.algorithms.settings import Settings, check_value
from etpo.errors import MAX_SEED, ConfigError, check_integer
from etpo.pretrained import pretrained

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"

# Keys that do not identify a run: not in the names of its folder and of its method, and free to
# change between the sessions of a study.
IGNORED_KEYS = (
    "ckpt_path",
    "study",
    "optimized_metric",
    "paths.log_dir",
    "environment.data_dir",
    "environment.score_cache",
    "environment.score_cache_entries",
    "environment.sandbox.workers",
)

_SPLIT = "not needed: forwards without gradient are split by their number of tokens"
# Keys and options of version 0.1 and their names now.
RENAMED = {
    "algorithm.leak": "algorithm.truncation_kl_coef",
    "algorithm.floor": "algorithm.pessimism_threshold",
    "algorithm.correction": "algorithm.doubly_robust",
    "algorithm.scale_objective": "algorithm.normalize_by_advantage_rms",
    "algorithm.beta_end_factor": "algorithm.beta_final_factor",
    "algorithm.beta_iters": "algorithm.beta_anneal_iters",
    "algorithm.lambda_iters": "algorithm.lambda_anneal_iters",
    "algorithm.vocabulary_chunk": "algorithm.logits_chunk_size",
    "algorithm.annotation_batch": _SPLIT,
    "algorithm.forward_batch_size": _SPLIT,
    "algorithm.clip_low": "algorithm.clip",
    "algorithm.clip_high": "algorithm.clip",
    "rollout.groups": "rollout.pipeline_groups",
    "algorithm=best_of_n": "algorithm=zero_shot (column rollout/best_reward_so_far)",
    "algorithm=etpo_td": "algorithm.lambda_anneal_iters=null",
    "algorithm=etpo_small_steps": "algorithm.lambda_anneal_iters=null algorithm.max_kl=0.2",
    "model=player": "model=game_lm",
    "experiment=comparison": "sweep=comparison",
    "sweep=algorithms": "sweep=comparison",
}


def renamed(text: str) -> str | None:
    """Return the new name if an error message of Hydra is about a renamed key or option."""
    keyword = re.search(r"unexpected keyword argument '(\w+)'", text)
    package = re.search(r"full_key: (\S+)", text)
    found = f"'{package[1]}.{keyword[1]}'" if keyword and package else ""
    for old, new in RENAMED.items():
        if f"'{old.replace('=', '/')}'" in text + found:
            return f"{old} is now {new}"
    return None


def tiny_checkpoint() -> str:
    """Return the folder of the embedded base model."""
    return str(Path(__file__).parent / "models" / "tiny" / "checkpoint")


def short_hash(*values: object) -> str:
    """Return ten hexadecimal digits that identify `values`."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:10]


def environment_name(environment: DictConfig) -> str:
    """Return the data set, the game, the gymnasium id, or the class of an environment's config."""
    dataset = environment.get("dataset")
    if dataset == "csv" and environment.get("path"):
        return Path(environment.path).stem
    game = (environment.get("kwargs") or {}).get("game")
    name = dataset or game or environment.get("id") or environment._target_.rpartition(".")[2]
    return str(name).split(":")[-1]  # a gymnasium id may start with the module that registers it


def model_name(name_or_path: str) -> str:
    """Return `tiny` for the embedded model, else the last part of a hub id or a folder."""
    return "tiny" if name_or_path == tiny_checkpoint() else Path(name_or_path).name


def algorithm_name(class_name: str) -> str:
    """Return the option of the group `algorithm`; without Hydra, the class name in snake case."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name).lower()
    return str(choices.get("algorithm", snake_case))


def run_name(algorithm: DictConfig, environment: DictConfig, model: DictConfig, seed: int) -> str:
    """Return the name of a run in W&B."""
    class_name = algorithm._target_.removesuffix(".from_config").rpartition(".")[2]
    names = algorithm_name(class_name), environment_name(environment)
    return " ".join([*names, model_name(model.name_or_path), f"seed {seed}"])


OmegaConf.register_new_resolver("ignored_keys", lambda: list(IGNORED_KEYS), replace=True)
for _resolver in (tiny_checkpoint, pretrained, short_hash, environment_name, model_name, run_name):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)


def check_missing(cfg: DictConfig) -> None:
    """Raise ConfigError if a value is `???`."""
    try:
        OmegaConf.to_container(cfg, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}=??? needs a value") from error


def check_config(cfg: DictConfig) -> None:
    """Raise ConfigError for a missing or impossible value that no constructor detects in time."""
    check_missing(cfg)
    OmegaConf.to_container(cfg, resolve=True)  # raises for an interpolation of an unknown key
    if OmegaConf.select(cfg, "task.mode") is not None and "mode" not in cfg.environment:
        raise ConfigError(
            "algorithm=reflexion needs prompts that carry a memory, environment.mode=remember; "
            "allowed is environment=data_science"
        )
    check_integer("seed", cfg.seed, 0, MAX_SEED)
    check_integer("trainer.max_epochs", cfg.trainer.max_epochs, 1)
    quantization, accelerator = cfg.model.get("quantization"), cfg.trainer.get("accelerator")
    if quantization is not None and accelerator == "cpu":
        raise ConfigError(
            f"model.quantization={quantization}: allowed with trainer.accelerator=cpu is null; nf4 "
            "needs trainer=gpu"
        )
    hints = get_type_hints(Settings)
    for each in fields(Settings):  # again in the constructor, after PyTorch was loaded
        if each.name in cfg.algorithm and not OmegaConf.is_interpolation(cfg.algorithm, each.name):
            name, value = f"algorithm.{each.name}", cfg.algorithm[each.name]
            check_value(name, value, hints[each.name], each)
    if "hidden_size" in (cfg.get("critic") or {}):
        check_integer("critic.hidden_size", cfg.critic.hidden_size, 1)
    limit = cfg.algorithm.get("max_grad_norm")
    for key, allowed, instead in (
        ("gradient_clip_val", limit, f"algorithm.max_grad_norm={limit}"),
        ("gradient_clip_algorithm", "norm", f"algorithm.max_grad_norm={limit}"),
        ("overfit_batches", None, "trainer.limit_train_batches=1, for actions are never reused"),
    ):
        value = cfg.trainer.get(key)
        if value and value != allowed:
            raise ConfigError(f"trainer.{key}={value}: allowed is null, or {instead}")
