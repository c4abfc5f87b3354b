"""`etpo-train`: compose the configuration, build the objects, fit, write the summary."""

import random
import signal
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from etpo.config import check_config
from etpo.console import console_script
from etpo.environments.conversation import make_environment
from etpo.resume import resume_arguments
from etpo.run_folder import held
from etpo.runtime import INTERRUPTED, TERMINATED, silence_libraries

if TYPE_CHECKING:  # imported late, so that bad input is refused before PyTorch is loaded
    from lightning import Trainer


def build(cfg: DictConfig, environment: Any) -> tuple["Trainer", dict[str, Any]]:
    """Return the trainer and the arguments of its `fit`; load the model last."""
    from lightning import seed_everything

    from etpo.callbacks.every_run import callback_options
    from etpo.callbacks.tracking import start_tracking
    from etpo.checkpoints import check_fits, load_resumable

    silence_libraries()  # again: Lightning sets its log level when it is imported
    path = cfg.ckpt_path
    content = None if path is None else load_resumable(path, cfg.trainer.max_epochs)
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.rollout, environment=environment)
    loggers = [instantiate(logger) for logger in (cfg.get("logger") or {}).values()]
    trainer = instantiate(cfg.trainer, logger=loggers, **callback_options(cfg, environment))
    datamodule.check_sizes(trainer.world_size)
    start_tracking(trainer.loggers)
    module = instantiate(cfg.algorithm, policy=instantiate(cfg.model))
    if content is not None:
        check_fits(module, content, path)
    return trainer, {"model": module, "datamodule": datamodule, "ckpt_path": path}


def fit(trainer: "Trainer", arguments: dict[str, Any]) -> str:
    """Train to the end, Ctrl-C or SIGTERM; return finished, interrupted, or stopped by a limit."""
    if trainer.world_size > 1:  # Lightning ends all processes at the same batch
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        trainer.fit(**arguments)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning left it ignored
        return "interrupted"
    except Exception:
        if trainer.strategy.launcher is not None:  # ends processes that wait for an environment
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise
    limit = trainer.limit_train_batches
    whole = isinstance(limit, float) and limit == 1.0 and not trainer.fast_dev_run
    whole = whole and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return "finished" if whole and trainer.current_epoch >= trainer.max_epochs else "stopped"


def train(cfg: DictConfig) -> tuple[dict[str, Any], "Trainer"]:
    """Train with the configuration `cfg`; return the summary and the trainer."""
    check_config(cfg)
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    environment = make_environment(cfg.environment)  # checks its input before Lightning is loaded
    try:
        trainer, arguments = build(cfg, environment)
        from etpo.callbacks.summary import close

        return close(trainer, cfg, fit(trainer, arguments)), trainer
    finally:
        environment.close()
        if "wandb" in sys.modules:  # else the next run of a multirun continues it
            sys.modules["wandb"].finish()


def train_and_judge(cfg: DictConfig) -> float | None:
    """Train; return `cfg.optimized_metric`. Exits if the run was interrupted."""
    summary, trainer = train(cfg)
    if trainer.received_sigterm or summary["status"] == "interrupted":
        sys.exit(TERMINATED if trainer.received_sigterm else INTERRUPTED)
    metric = trainer.callback_metrics.get(cfg.optimized_metric)
    return None if metric is None else float(metric)


@console_script("train", resume_arguments)
def main(cfg: DictConfig) -> float | None:
    """Console script: `etpo-train [key=value ...]`."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from etpo.studies.multirun import run_in_study

        return run_in_study(cfg, train_and_judge)
    with held(cfg):
        return train_and_judge(cfg)


if __name__ == "__main__":
    main()
