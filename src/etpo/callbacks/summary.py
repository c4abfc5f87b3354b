"""`summary.json`, and the summary that is printed when a run ends."""

import json
import math
import platform
import resource
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from rich.console import Console

from etpo.callbacks.best_action import BestAction
from etpo.callbacks.ranks import gather
from etpo.callbacks.tracking import track_results
from etpo.config import algorithm_name
from etpo.files import write_text
from etpo.overrides import shell_word

PACKAGES = ("etpo", "lightning", "torch", "transformers", "scikit-learn", "numpy")

# key of the summary: metric of the iteration
FIRST = {"first_mean_reward": "rollout/reward", "valid_rate_first": "rollout/valid_rate"}
LAST = {
    "last_mean_reward": "rollout/reward",
    "last_greedy_reward": "val/reward",
    "valid_rate_last": "rollout/valid_rate",
    "kl_to_reference_last": "rollout/kl_to_reference",
}
# label and path of a run's files
FILES = (
    ("metrics", "metrics.csv"),
    ("learning curve", "learning_curve.png"),
    ("best action", "best_action.py"),
    ("best action", "best_action.txt"),
    ("episodes", "episodes.jsonl"),
    ("token credit", "credit.html"),
    ("checkpoint", "checkpoints/last.ckpt"),
)
# label, keys (first and last iteration) and format of the closing's numbers
NUMBERS = (
    ("mean reward", ("first_mean_reward", "last_mean_reward"), ".3f"),
    ("valid actions", ("valid_rate_first", "valid_rate_last"), ".0%"),
    ("greedy reward", ("last_greedy_reward",), ".3f"),
    ("best reward", ("best_reward",), ".3f"),
    ("held-out AUC", ("held_out_auc",), ".3f"),
    ("KL to reference", ("kl_to_reference_last",), ".3f"),
    ("tokens per second", ("tokens_per_second",), ".0f"),
)
COUNTS = ("env_steps", "action_tokens", "cache_hits")


class RunSummary(Callback):
    """Collect `numbers` of a run over all ranks, by key of `summary.json`; None if unknown.

    A resumed run continues the counts. Logs `rollout/best_reward_so_far` and
    `time/iteration_seconds`.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {
            **dict.fromkeys(["iterations", *COUNTS], 0),
            **dict.fromkeys([*FIRST, *LAST, "best_reward", "tokens_per_second"]),
            **dict.fromkeys(["wall_seconds", "peak_memory_mib"], 0.0),
        }
        self.generate_seconds = self.started = 0.0
        self.metrics: dict[str, float] = {}  # of the last iteration

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.metrics = metrics
        rollout, numbers = trainer.datamodule.rollout, self.numbers
        ranks = gather(
            {
                "env_steps": len(rollout.records),
                "action_tokens": int(rollout.actions.action_mask.sum()),
                "cache_hits": sum(record.cached for record in rollout.records),
                "best_reward": max(record.reward for record in rollout.records),
            }
        )
        for key in COUNTS:
            numbers[key] += sum(rank[key] for rank in ranks)
        if numbers["iterations"] == 0:
            numbers |= {key: metrics.get(name) for key, name in FIRST.items()}
        numbers |= {key: metrics.get(name) for key, name in LAST.items()}
        # the best reward so far is None at first, and after a change of the data
        best = [found["best_reward"] for found in (numbers, *ranks)]
        numbers["best_reward"] = max(reward for reward in best if reward is not None)
        self.generate_seconds += metrics["time/generate_seconds"]
        tokens = numbers["action_tokens"]
        numbers["tokens_per_second"] = tokens / self.generate_seconds if tokens else None
        numbers["iterations"] = trainer.current_epoch + 1
        peak = peak_memory_mib(pl_module.device)
        numbers["peak_memory_mib"] = max(numbers["peak_memory_mib"], peak)
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        numbers["wall_seconds"] += seconds
        pl_module.log("rollout/best_reward_so_far", numbers["best_reward"], sync_dist=True)
        pl_module.log("time/iteration_seconds", seconds, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        seconds = self.generate_seconds
        return {"numbers": self.numbers, "generate_seconds": seconds, "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.numbers = dict(state_dict["numbers"])
        self.generate_seconds = state_dict["generate_seconds"]
        self.metrics = state_dict["metrics"]


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory so far: of this process on a CPU, of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def close(trainer: Trainer, cfg: DictConfig, status: str) -> dict[str, Any]:
    """Write, track and print the summary of a run on rank zero; return it."""
    if not trainer.is_global_zero:
        return {"status": status}
    environment, held_out_auc = trainer.datamodule.environment, None
    best = next((c.best for c in trainer.callbacks if isinstance(c, BestAction)), None)
    if best is not None and hasattr(environment, "held_out_score"):
        held_out_auc = environment.held_out_score(best["action"])
    counted = [c for c in trainer.callbacks if isinstance(c, RunSummary)]
    numbers = counted[0].numbers if counted else {}
    # of the checkpoint, if the resumed run had no iteration left
    metrics = {**(counted[0].metrics if counted else {}), **trainer.callback_metrics}
    value = metrics.get(cfg.optimized_metric)
    finite = value is not None and math.isfinite(value)
    summary = {
        "status": status,
        "algorithm": algorithm_name(type(trainer.lightning_module).__name__),
        "environment": environment.task_name,
        "dataset": cfg.environment.get("dataset"),
        "data_hash": getattr(environment, "content_hash", None),
        "model": cfg.model.name_or_path,
        "seed": cfg.seed,
        "sandbox": getattr(environment, "sandbox_level", None),
        "last_metrics": {cfg.optimized_metric: float(value)} if finite else {},
        **numbers,
        # not the iterations of `numbers`: a signal may arrive before the checkpoint is written
        "iterations": trainer.fit_loop.epoch_progress.current.completed,
        "held_out_auc": held_out_auc,
    }
    folder = Path(cfg.paths.output_dir)
    write_summary(folder, summary)
    track_results(trainer.loggers, summary, folder)
    print_closing(summary, folder)
    return summary


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json` with package versions; replace numbers that are not finite by null."""
    for key, value in summary.items():
        if isinstance(value, float) and not math.isfinite(value):
            summary[key] = None
    versions = {name: version(name) for name in PACKAGES}
    summary["versions"] = versions | {"python": platform.python_version()}
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def print_closing(summary: dict[str, Any], folder: Path) -> None:
    """Print the numbers of a run, its files, and the commands to continue."""
    iterations, finished = summary["iterations"], summary["status"] == "finished"
    rows = []
    for label, keys, form in NUMBERS:
        known = [summary[key] for key in keys if summary.get(key) is not None]
        if known:
            rows.append((label, " -> ".join(f"{number:{form}}" for number in known)))
    rows += [(label, str(folder / name)) for label, name in FILES if (folder / name).exists()]
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        checkpoint = shell_word("ckpt_path", str(last))
        more = f" trainer.max_epochs={2 * iterations}" if finished else ""
        rows.append(("train longer" if finished else "go on", f"etpo-train {checkpoint}{more}"))
        rows.append(("evaluate", f"etpo-evaluate {checkpoint}"))
    counts = f"{iterations} iterations"
    if "env_steps" in summary:
        counts += f", {summary['env_steps']} actions, {summary['wall_seconds']:.0f} s"
    print_rows(f"\n[bold]{summary['status'].capitalize()}[/bold] after {counts}", rows)


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a title with rich's markup and an indented row for each label and text."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(title)
    for label, text in rows:
        console.print(f"  {label:<18}{text}", markup=False)
