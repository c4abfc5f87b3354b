"""`etpo-train`: compose the configuration, build the loop, run it, say how it went."""

import ctypes
import json
import logging
import math
import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from transformers.utils import logging as transformers_logging

from etpo.callbacks.best_action import BestAction
from etpo.callbacks.run_start import KnownMetric, RunStart
from etpo.callbacks.same_rewards import SameRewards
from etpo.callbacks.summary import RunSummary, print_closing, write_summary
from etpo.callbacks.tracking import start_tracking, track_results
from etpo.config import (
    CONF,
    check_config,
    exit_on_bad_input,
    load_checkpoint,
    short_hash,
    study_arguments,
)
from etpo.environments.text_env import TextVectorEnv
from etpo.errors import ConfigError
from etpo.models.policy import tiny_checkpoint
from etpo.resume import check_optimizer, check_progress, resume_arguments
from etpo.run_folder import held
from etpo.studies.multirun import run_in_study

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INTERRUPTED, TERMINATED = 130, 143  # exit status after Ctrl-C and after SIGTERM


@dataclass
class Run:
    """The objects of one run."""

    environment: TextVectorEnv
    module: LightningModule
    datamodule: LightningDataModule
    trainer: Trainer

    def callback(self, kind: type) -> Any:
        """The trainer's callback of a class, or None."""
        return next((c for c in self.trainer.callbacks if isinstance(c, kind)), None)


def build(cfg: DictConfig) -> Run:
    """Everything that `cfg` names; the environment's input is checked before a model is loaded."""
    environment = instantiate(cfg.environment)
    try:
        return build_with(environment, cfg)
    except BaseException:
        environment.close()
        wandb.finish()
        raise


def build_with(environment: TextVectorEnv, cfg: DictConfig) -> Run:
    """As `build`, around its environment."""
    datamodule = instantiate(cfg.rollout, environment=environment)
    loggers = [instantiate(logger) for logger in (cfg.get("logger") or {}).values()]
    callbacks = [instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()]
    own = [RunStart(cfg), SameRewards(reward_key(environment, cfg.environment))]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        callbacks.append(KnownMetric(str(cfg.optimized_metric)))
    limits = {}
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        limits["enable_checkpointing"] = False  # else Lightning adds a callback of its own
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=[*own, *callbacks], **limits)
    datamodule.check_sizes(trainer.world_size)
    start_tracking(trainer.loggers)
    module = instantiate(cfg.algorithm, policy=instantiate(cfg.model))
    if cfg.ckpt_path is not None:
        content = load_checkpoint(cfg.ckpt_path)
        check_progress(content, cfg.ckpt_path, cfg.trainer.max_epochs)
        check_weights(module, cfg.ckpt_path, cfg.model.name_or_path)
        check_optimizer(module, content)
    return Run(environment, module, datamodule, trainer)


def check_weights(module: LightningModule, ckpt_path: str, model: str) -> None:
    """Raises ConfigError unless the checkpoint holds what `module` would write, in its shapes."""
    own = {"state_dict": module.state_dict(), "optimizer_states": []}  # not the weights alone
    module.on_save_checkpoint(own)  # leaves frozen weights out
    own, saved = (
        {name: weight.shape for name, weight in content["state_dict"].items()}
        for content in (own, load_checkpoint(ckpt_path))
    )
    name = next((n for n in saved | own if own.get(n) != saved.get(n)), None)
    if name is not None:
        raise ConfigError(
            f"ckpt_path={ckpt_path}: its weights do not fit model.name_or_path={model} ({name}); "
            "allowed are the model=, model.lora= and critic= that it was trained with"
        )


@rank_zero_only
def warn_of_embedded_model(environment: TextVectorEnv, model: str) -> None:
    """Warns of a run that is unlikely to learn: the embedded model writes programs only."""
    if model == tiny_checkpoint() and environment.task_name != "data_science":
        print(
            f"warning: the embedded model (model=tiny) writes scikit-learn programs, whatever "
            f"{environment.task_name} asks; model=causal_lm model.name_or_path=<id or folder> "
            "takes another model",
            file=sys.stderr,
        )


def fit(run: Run, ckpt_path: str | None) -> str:
    """Trains until the last iteration, Ctrl-C or SIGTERM; returns finished or interrupted."""
    if run.trainer.world_size > 1:  # Lightning ends all processes at the same batch
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        run.trainer.fit(run.module, run.datamodule, ckpt_path=ckpt_path)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        if not run.trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning left it ignored
        return "interrupted"
    except Exception:
        launcher = run.trainer.strategy.launcher
        if launcher is not None:  # a process that waits for its environment would stay
            launcher.kill(signal.SIGKILL)
        raise
    return "finished"


def reward_key(environment: TextVectorEnv, cfg: DictConfig) -> str:
    """Names what rewards depend on besides the action, as far as it is known."""
    own = getattr(environment, "reward_key", None)
    settings = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("num_envs", None)
    return own or short_hash(json.dumps(settings, sort_keys=True, default=str))


def close(run: Run, cfg: DictConfig, status: str) -> dict[str, Any]:
    """Scores the best program on the held-out rows, once, and writes `summary.json`."""
    kept = run.callback(BestAction)
    best = None if kept is None else kept.best
    held_out_auc = None
    if best is not None and hasattr(run.environment, "held_out_score"):
        held_out_auc = run.environment.held_out_score(best["action"])
    value = run.trainer.callback_metrics.get(cfg.optimized_metric)
    finite = value is not None and math.isfinite(value)
    identity = {
        "algorithm": type(run.module).__name__.lower(),
        "environment": run.environment.task_name,
        "dataset": cfg.environment.get("dataset"),
        "data_hash": getattr(run.environment, "content_hash", None),
        "model": cfg.model.name_or_path,
        "seed": cfg.seed,
        "sandbox": getattr(run.environment, "sandbox_level", None),
        "iterations": run.trainer.current_epoch,
        "last_metrics": {cfg.optimized_metric: float(value)} if finite else {},
    }
    return write_summary(
        Path(cfg.paths.output_dir),
        status=status,
        collected=run.callback(RunSummary),
        identity=identity,
        held_out_auc=held_out_auc,
    )


def is_complete(trainer: Trainer, max_epochs: int) -> bool:
    """Whether all iterations ran, each with all of its updates."""
    limit = trainer.limit_train_batches
    whole = isinstance(limit, float) and limit == 1.0
    whole = whole and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return trainer.current_epoch >= max_epochs and whole and not trainer.fast_dev_run


def train(cfg: DictConfig) -> tuple[dict[str, Any], Run]:
    """Trains with the configuration `cfg`; returns the summary and the objects of the run.

    Its status is finished; stopped, where a limit (`trainer.max_time`, `max_steps`,
    `limit_train_batches`, `fast_dev_run`) or a callback ended it before its last iteration or
    update; or interrupted, after Ctrl-C or SIGTERM.
    """
    check_config(cfg)
    folder = Path(cfg.paths.output_dir)
    seed_everything(cfg.seed, workers=True, verbose=False)
    run = build(cfg)
    warn_of_embedded_model(run.environment, cfg.model.name_or_path)
    try:
        status = fit(run, cfg.ckpt_path)
        if status == "finished" and not is_complete(run.trainer, cfg.trainer.max_epochs):
            status = "stopped"
        summary = {"status": status}
        if run.trainer.is_global_zero:
            summary = close(run, cfg, status)
            track_results(run.trainer.loggers, summary, folder)
            print_closing(summary, folder)
    finally:
        run.environment.close()
        wandb.finish()  # the next run of a multirun gets its own
    return summary, run


def keep_freed_memory() -> None:
    """Has glibc keep the memory of large tensors; else every new one faults its pages in again.

    Saves about a quarter of a training step on a CPU. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, 2**31 - 1)


def quiet() -> None:
    """Silences what Lightning says about a loop that is meant to be as it is; no loading bars."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # prints its table
    for message in (
        r"Found \d+ module\(s\) in eval mode",
        r"Your `IterableDataset` has `__len__` defined",
        r".*does not have many workers",
        r".*exists and is not empty",
        r".*treespec, LeafSpec",
        r"`(is_)?gradient_checkpointing(_enable)?` is deprecated",
        r"torch\.distributed\.nn\.functional\.all_gather is deprecated",
    ):
        warnings.filterwarnings("ignore", message)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def hydra_main(cfg: DictConfig) -> float | None:
    quiet()
    keep_freed_memory()
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_in_study(cfg, train_and_judge)
    with exit_on_bad_input(), held(cfg):
        return train_and_judge(cfg)


def train_and_judge(cfg: DictConfig) -> float | None:
    """Trains; returns `cfg.optimized_metric`. Ends the process where the run was interrupted."""
    summary, run = train(cfg)
    if run.trainer.received_sigterm:
        sys.exit(TERMINATED)
    if summary.get("status") == "interrupted":
        sys.exit(INTERRUPTED)
    metric = run.trainer.callback_metrics.get(cfg.optimized_metric)
    return None if metric is None else float(metric)


def terminate(number: int, frame: FrameType | None) -> None:
    """Ends the process where it stands, in an orderly way.

    Lightning alone would wait for the next batch, hence for a whole rollout, and lose a SIGTERM
    that comes after the last one: a multirun would go on with its next cell.
    """
    sys.exit(TERMINATED)


def main() -> None:
    """Console script: `etpo-train [key=value ...]`."""
    with exit_on_bad_input():
        if not {"-sc", "--shell-completion", "--shell_completion"} & set(sys.argv[1:]):
            sys.argv[1:] = study_arguments(resume_arguments(sys.argv[1:]))
        with suppress(ImportError):  # without the extra `sweep`
            from etpo.search import register

            register()
    previous = signal.signal(signal.SIGTERM, terminate)  # Lightning calls it after its own
    try:
        hydra_main()
    except KeyboardInterrupt:  # before or after training; `fit` ends it in an orderly way
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
