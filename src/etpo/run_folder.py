"""The folder of a run: locked by one process, removed if the run is refused."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from etpo.config import short_hash
from etpo.errors import ConfigError
from etpo.files import output_errors, write_text
from etpo.resume import CheckpointInConfig, check_same_run, run_folder

# A folder with one of these files belongs to a run.
RESULTS = (
    *("metrics.csv", "episodes.jsonl", "credit.jsonl", "summary.json"),
    *("best_action.py", "best_action.txt", "checkpoints/last.ckpt", "checkpoints/best.ckpt"),
)
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")


class RunFolder(Callback):
    """Hydra callback: note the folders that a run creates; name a study without a name.

    The name is a hash of the overrides in any order, without the launcher's.
    """

    multirun: DictConfig | None = None  # the configuration of the study
    made: tuple[Path, ...] = ()  # folders that Hydra creates for the run, the deepest first

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = " ".join(OmegaConf.to_container(config.hydra.overrides.task))
        if config.get("task_name") == "train" and config.ckpt_path and "ckpt_path=" not in given:
            raise CheckpointInConfig(str(config.ckpt_path))
        folder = Path(config.hydra.run.dir).absolute()
        missing = (path for path in (folder, *folder.parents) if not path.exists())
        RunFolder.made = tuple(missing) if is_main_process() else ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        RunFolder.multirun, task = config, config.hydra.overrides.task
        if config.get("study", "") is None:
            other = ("hydra.mode", "hydra/launcher", "hydra.launcher")
            own = [o for o in config.hydra.overrides.hydra if not o.startswith(other)]
            config.study = short_hash(*sorted([*OmegaConf.to_container(task), *own]))
            with read_write(config.hydra):
                task.append(f"study={config.study}")


def is_main_process() -> bool:
    """Return True in the first process of the first node."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def remove_made() -> None:
    """Remove the folder that was created for the run, and its new parents while empty."""
    made, RunFolder.made = RunFolder.made, ()
    for folder in made[:1]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in made[1:]:
        with suppress(OSError):  # another run has created its folder there
            folder.rmdir()


@contextmanager
def held(cfg: DictConfig) -> Iterator[None]:
    """Lock the folder of the run `cfg` for this process, and remove it if training does not start.

    Raises ConfigError for a folder that another process holds, or that has results of another run.
    """
    folder = Path(cfg.paths.output_dir)
    lock = folder / "lock"
    new_lock, accepted = not lock.exists(), False
    try:
        with claimed(folder) as mine:
            if not mine:
                raise ConfigError(
                    f"hydra.run.dir={folder}: another process runs there; allowed is another folder"
                )
            if is_main_process():
                check_owner(folder, cfg)
            accepted = True
            yield
    finally:
        started = (folder / ".hydra").exists()
        if is_main_process() and new_lock and not (accepted and started):
            lock.unlink(missing_ok=True)
        if not started:
            remove_made()


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Yield True if this process alone holds the folder, until the context or the process ends."""
    if not is_main_process():  # the first process claims it for all
        yield True
        return
    with output_errors(folder / "lock"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def check_owner(folder: Path, cfg: DictConfig) -> None:
    """Raise ConfigError if the folder has results of a run that is not the one resumed."""
    resumed = None if cfg.ckpt_path is None else run_folder(Path(str(cfg.ckpt_path)))
    if resumed is not None and resumed.resolve() == folder.resolve():
        check_same_run(folder, cfg)
    elif any((folder / name).exists() for name in RESULTS):
        raise ConfigError(
            f"hydra.run.dir={folder}: it has the results of a run; allowed is another folder, or "
            f"ckpt_path={folder} to resume that run"
        )


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Write `.hydra/`, which Hydra would write before the run is checked."""
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    parts = {"config": cfg, "hydra": {"hydra": hydra}, "overrides": hydra.overrides.task}
    for name, content in parts.items():
        write_text(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(content))
