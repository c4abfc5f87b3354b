"""Callbacks of every run, in addition to the configured ones."""

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

from etpo.config import short_hash
from etpo.errors import UnknownMetric
from etpo.run_folder import save_config

# Callbacks whose state compares rewards of several iterations.
COMPARING = ("BestAction", "ModelCheckpoint", "EarlyStopping")


def callback_options(cfg: DictConfig, environment: Any) -> dict[str, Any]:
    """Return the Trainer's arguments for the callbacks of `cfg` and of every run."""
    settings = OmegaConf.to_container(cfg.environment, resolve=True)
    settings.pop("num_envs", None)
    key = getattr(environment, "reward_key", None)
    key = key or short_hash(json.dumps(settings, sort_keys=True, default=str))
    groups = (cfg.get("callbacks") or {}).values()
    configured = [instantiate(callback) for callback in groups if callback is not None]
    options: dict[str, Any] = {"callbacks": [*configured, EveryRun(cfg, key)]}
    if not any(isinstance(callback, Checkpoint) for callback in configured):
        options["enable_checkpointing"] = False  # else Lightning adds a callback
    return options


class EveryRun(Callback):
    """Write `.hydra/` and log the configuration `cfg`; come after the callbacks that log metrics.

    A multirun whose first iteration does not log `optimized_metric` raises UnknownMetric. A run
    resumed with another `reward_key` (data, splits, limits) drops its best reward and its replay
    window.
    """

    def __init__(self, cfg: DictConfig, reward_key: str) -> None:
        self.cfg, self.reward_key = cfg, reward_key

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            save_config(Path(self.cfg.paths.output_dir), self.cfg)
            logging.getLogger("etpo").info(f"started, {trainer.max_epochs} iterations")
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(self.cfg, resolve=True))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = str(self.cfg.optimized_metric)
        known = {*trainer.callback_metrics, "val/reward"}  # not every iteration validates
        multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
        if multirun and name not in known:
            allowed = ", ".join(sorted(known))
            raise UnknownMetric(f"optimized_metric={name}: allowed are {allowed}")

    def state_dict(self) -> dict[str, Any]:
        return {"reward_key": self.reward_key}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint["callbacks"]
        saved = states.get(self.state_key, self.state_dict())
        if saved["reward_key"] != self.reward_key:
            for name in [name for name in states if name.startswith(COMPARING)]:
                del states[name]
            if "RunSummary" in states:
                states["RunSummary"]["numbers"]["best_reward"] = None
            trainer.datamodule.replay.past.clear()  # Lightning has restored the data module
