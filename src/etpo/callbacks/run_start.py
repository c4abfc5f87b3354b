"""What a run writes and checks at its start: configuration, log file, the metric of a study."""

import logging
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from etpo.errors import UnknownMetric
from etpo.files import output_errors
from etpo.run_folder import save_config


class RunStart(Callback):
    """Writes the first files of a run, once everything is checked."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(self.cfg.paths.output_dir)
        if trainer.is_global_zero:
            log_to(folder / "train.log")
            save_config(folder, self.cfg)
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(self.cfg, resolve=True))


class KnownMetric(Callback):
    """Raises UnknownMetric after the first iteration of a multirun that logs no `name`.

    It comes after the callbacks that log.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = {*trainer.callback_metrics, "val/reward"}  # not every iteration validates
        if self.name not in known:
            allowed = ", ".join(sorted(known))
            raise UnknownMetric(f"optimized_metric={self.name}: allowed are {allowed}")


class LogFile(logging.FileHandler):
    """Ends the run with one line where the disk is full; logging itself prints a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        with output_errors(Path(self.baseFilename)):
            raise


def log_to(file: Path) -> None:
    """Sends the records of the logger `etpo` to `file` alone."""
    logger = logging.getLogger("etpo")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    with output_errors(file):
        handler = LogFile(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
