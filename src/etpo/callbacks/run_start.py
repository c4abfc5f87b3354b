"""Callbacks of every run: its configuration on disk, the metric of a study, comparable rewards."""

import json
import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig, OmegaConf

from etpo.callbacks.same_rewards import SameRewards
from etpo.config import short_hash
from etpo.errors import UnknownMetric
from etpo.run_folder import save_config


def callback_options(cfg: DictConfig, environment: Any) -> dict[str, Any]:
    """Return the Trainer's arguments for the callbacks of `cfg` and of every run."""
    settings = OmegaConf.to_container(cfg.environment, resolve=True)
    settings.pop("num_envs", None)
    key = getattr(environment, "reward_key", None)
    key = key or short_hash(json.dumps(settings, sort_keys=True, default=str))
    configured = [instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()]
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    last = [KnownMetric(str(cfg.optimized_metric))] if multirun else []
    options: dict[str, Any] = {"callbacks": [RunStart(cfg), SameRewards(key), *configured, *last]}
    if not any(isinstance(callback, Checkpoint) for callback in configured):
        options["enable_checkpointing"] = False  # else Lightning adds a callback
    return options


class RunStart(Callback):
    """Write `.hydra/` and log the configuration, once everything is checked."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            save_config(Path(self.cfg.paths.output_dir), self.cfg)
            logging.getLogger("etpo").info(f"started, {trainer.max_epochs} iterations")
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(self.cfg, resolve=True))


class KnownMetric(Callback):
    """Raise UnknownMetric after the first iteration of a multirun that does not log `name`.

    It comes after the callbacks that log.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = {*trainer.callback_metrics, "val/reward"}  # not every iteration validates
        if self.name not in known:
            allowed = ", ".join(sorted(known))
            raise UnknownMetric(f"optimized_metric={self.name}: allowed are {allowed}")
