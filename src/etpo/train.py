"""`etpo-train`: compose the configuration, build the loop, run it, say how it went."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from etpo.callbacks.summary import RunSummary, print_closing, write_summary
from etpo.config import CONF, check_config, exit_on_bad_input, resume_arguments
from etpo.environments.text_env import TextVectorEnv


@dataclass
class Run:
    """The objects of one run."""

    environment: TextVectorEnv
    module: LightningModule
    datamodule: LightningDataModule
    trainer: Trainer


def build(cfg: DictConfig) -> Run:
    """Everything that `cfg` names; the environment's input is checked before a model is loaded."""
    environment = instantiate(cfg.environment)
    datamodule = instantiate(cfg.rollout, environment=environment)
    loggers = [instantiate(logger) for logger in (cfg.logger or {}).values()]
    callbacks = [instantiate(callback) for callback in (cfg.callbacks or {}).values()]
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks)
    datamodule.check(trainer.world_size)
    module = instantiate(cfg.algorithm, backbone=instantiate(cfg.model))
    return Run(environment, module, datamodule, trainer)


def train(cfg: DictConfig) -> tuple[dict[str, Any], Run]:
    """Trains as `cfg` says; returns the summary and the objects of the run."""
    check_config(cfg)
    folder = Path(cfg.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(cfg.seed, workers=True, verbose=False)
    run = build(cfg)
    try:
        run.trainer.fit(run.module, run.datamodule, ckpt_path=cfg.ckpt_path)
    finally:
        run.environment.close()
    return {}, run


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def hydra_main(cfg: DictConfig) -> float | None:
    with exit_on_bad_input():
        summary, _ = train(cfg)
    return summary.get("optimized_metric")


def main() -> None:
    """Console script: `etpo-train [key=value ...]`."""
    with exit_on_bad_input():
        sys.argv[1:] = resume_arguments(sys.argv[1:])
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    hydra_main()


if __name__ == "__main__":
    main()
