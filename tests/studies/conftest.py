"""Small studies on disk, with numbers that can be worked out by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """write_run(folder, overrides, rewards, **summary): a run of 10 actions an iteration."""

    def write(
        folder: Path, overrides: Sequence[str], rewards: Sequence[float], **changes: object
    ) -> Path:
        given = dict(o.split("=", 1) for o in overrides)
        hydra = {
            "overrides": {"task": list(overrides)},
            "runtime": {"choices": {"algorithm": given.get("algorithm", "etpo")}},
        }
        (folder / ".hydra").mkdir(parents=True)
        OmegaConf.save({"hydra": hydra}, folder / ".hydra" / "hydra.yaml")
        OmegaConf.save(list(overrides), folder / ".hydra" / "overrides.yaml")
        summary = {
            "status": "finished",
            "algorithm": "class",
            "environment": "data_science",
            "dataset": given.get("environment.dataset", "tic_tac_toe"),
            "seed": int(given["seed"]),
            "iterations": len(rewards),
            "env_steps": 10 * len(rewards),
            "best_reward": 1.0,
            "held_out_auc": 0.97,
            "wall_seconds": 12.25,
        }
        (folder / "summary.json").write_text(json.dumps(summary | changes))
        lines = [
            f"{i},{r!r},0.5,{r + 0.01!r},{i / 3!r},1.0" for i, r in enumerate(map(float, rewards))
        ]
        head = "iteration,rollout/reward,rollout/valid_rate,val/reward,rollout/kl_to_reference"
        (folder / "metrics.csv").write_text("\n".join([f"{head},rollout/best_reward", *lines]))
        return folder

    return write


@pytest.fixture
def study(tmp_path, write_run) -> Path:
    """Two methods with two and three seeds on two data sets; three runs that are excluded."""
    folder = tmp_path / "multiruns" / "small"
    curves = {"etpo": (0.0, 0.5, 0.9, 1.0), "ppo_kl": (0.0, 0.25, 0.5, 0.5)}
    for dataset in ("balance_scale", "tic_tac_toe"):
        for algorithm, rewards in curves.items():
            for seed in range(2 if algorithm == "etpo" else 3):
                overrides = (
                    f"algorithm={algorithm}",
                    f"environment.dataset={dataset}",
                    f"seed={seed}",
                )
                shifted = [r * (1 - 0.01 * seed) for r in rewards]
                write_run(folder / f"{algorithm}{dataset}{seed}", overrides, shifted)
    write_run(folder / "stopped", ["seed=7"], [0.0, 1.0], status="interrupted")
    (write_run(folder / "open", ["seed=8"], [0.0]) / "summary.json").unlink()
    failed = write_run(folder / "broken", ["seed=9", "environment.score_cache=x"], [0.0])
    (failed / "failed.txt").write_text("seed=9: it broke\n\nTraceback\n")
    return folder
