"""What a run came to: `summary.json`, and what is printed when it ends."""

import json
import math
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console

from etpo.callbacks.ranks import gather
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
# label and path of what a run leaves
FILES = (
    ("metrics", "metrics.csv"),
    ("learning curve", "learning_curve.png"),
    ("best action", "best_action.py"),
    ("best action", "best_action.txt"),
    ("episodes", "episodes.jsonl"),
    ("token credit", "credit.html"),
    ("checkpoint", "checkpoints/last.ckpt"),
)
# attributes of RunSummary that a checkpoint keeps
STATE = (
    "iterations",
    "counts",
    "numbers",
    "generate_seconds",
    "wall_seconds",
    "peak_memory_mib",
)


class RunSummary(Callback):
    """Counts what a run spends and keeps its first and last numbers, over all ranks.

    A resumed run goes on counting, so that its summary covers the iterations before it too.
    Logs `rollout/best_reward_so_far` and `time/iteration_seconds`.
    """

    def __init__(self) -> None:
        self.iterations = 0
        self.counts = {"env_steps": 0, "action_tokens": 0, "cache_hits": 0}
        self.numbers: dict[str, float | None] = dict.fromkeys([*FIRST, *LAST, "best_reward"])
        self.generate_seconds = 0.0
        self.wall_seconds = 0.0
        self.peak_memory_mib = 0.0
        self.started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rollout = trainer.datamodule.rollout
        ranks = gather(
            {
                "env_steps": len(rollout.records),
                "action_tokens": int(rollout.actions.action_mask.sum()),
                "cache_hits": sum(record.cached for record in rollout.records),
                "best_reward": max(record.reward for record in rollout.records),
            }
        )
        for key in self.counts:
            self.counts[key] += sum(rank[key] for rank in ranks)
        best = max(rank["best_reward"] for rank in ranks)
        if self.iterations == 0:
            self.numbers |= {key: metrics.get(name) for key, name in FIRST.items()}
        self.numbers |= {key: metrics.get(name) for key, name in LAST.items()}
        before = self.numbers["best_reward"]  # None at first, and where the data has changed
        self.numbers["best_reward"] = best if before is None else max(best, before)
        pl_module.log("rollout/best_reward_so_far", self.numbers["best_reward"], sync_dist=True)
        self.generate_seconds += metrics["time/generate_seconds"]
        self.iterations = trainer.current_epoch + 1
        self.peak_memory_mib = max(self.peak_memory_mib, peak_memory_mib(pl_module.device))
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        self.wall_seconds += seconds
        pl_module.log("time/iteration_seconds", seconds, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state_dict[name])

    def summary(self) -> dict[str, Any]:
        """The run's numbers by key of `summary.json`; null where no iteration was completed."""
        tokens = self.counts["action_tokens"]
        return {
            "iterations": self.iterations,
            **self.counts,
            **self.numbers,
            "tokens_per_second": tokens / self.generate_seconds if tokens else None,
            "wall_seconds": self.wall_seconds,
            "peak_memory_mib": self.peak_memory_mib,
        }


def peak_memory_mib(device: torch.device) -> float:
    """The largest memory so far: of this process on a CPU, of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def write_summary(
    folder: Path,
    *,
    status: str,
    collected: RunSummary | None,
    identity: dict[str, Any],
    held_out_auc: float | None,
) -> dict[str, Any]:
    """Writes `folder/summary.json` in one step and returns what it holds.

    collected: None leaves its numbers out. Numbers that are not finite become null.
    """
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    summary = {
        "status": status,
        **identity,
        **({} if collected is None else collected.summary()),
        "held_out_auc": held_out_auc,
        "versions": versions,
    }
    for key, value in summary.items():
        if isinstance(value, float) and not math.isfinite(value):
            summary[key] = None
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def print_closing(summary: dict[str, Any], folder: Path) -> None:
    """Says how the run went, where its files are, and how to go on."""
    iterations, finished = summary["iterations"], summary["status"] == "finished"
    rows = closing_numbers(summary)
    for label, name in FILES:
        if (folder / name).exists():
            rows.append((label, str(folder / name)))
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        checkpoint = shell_word("ckpt_path", str(last))
        more = f" trainer.max_epochs={2 * iterations}" if finished else ""
        rows.append(("train longer" if finished else "go on", f"etpo-train {checkpoint}{more}"))
        rows.append(("evaluate", f"etpo-evaluate {checkpoint}"))
    counts = f"{iterations} iterations"
    if "env_steps" in summary:
        counts += f", {summary['env_steps']} actions, {summary['wall_seconds']:.0f} s"
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"\n[bold]{summary['status'].capitalize()}[/bold] after {counts}")
    for label, text in rows:
        console.print(f"  {label:<18}{text}", markup=False)


def closing_numbers(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of the numbers that are known."""

    def text(key: str, form: str) -> str:
        return "-" if summary.get(key) is None else f"{summary[key]:{form}}"

    rows = [
        ("mean reward", f"{text('first_mean_reward', '.3f')} -> {text('last_mean_reward', '.3f')}"),
        ("valid actions", f"{text('valid_rate_first', '.0%')} -> {text('valid_rate_last', '.0%')}"),
        ("greedy reward", text("last_greedy_reward", ".3f")),
        ("best reward", text("best_reward", ".3f")),
        ("held-out AUC", text("held_out_auc", ".3f")),
        ("KL to reference", text("kl_to_reference_last", ".3f")),
        ("tokens per second", text("tokens_per_second", ".0f")),
    ]
    return [row for row in rows if row[1] not in ("-", "- -> -")]
