"""The folder of a run: its own, held by one process, left as it was where the run is refused."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from etpo.config import exit_on_bad_input, load_checkpoint, run_folder
from etpo.errors import ConfigError
from etpo.files import output_errors, write_text
from etpo.resume import check_unchanged

# What a run has measured; a folder that holds one of them belongs to it.
RESULTS = (
    "metrics.csv",
    "episodes.jsonl",
    "credit.jsonl",
    "summary.json",
    "best_action.py",
    "best_action.txt",
    "checkpoints/last.ckpt",
    "checkpoints/best.ckpt",
)


class RunFolder(Callback):
    """Hydra's callback that makes the folder of a single run before Hydra does.

    A folder that is named by the time gets a number at its end where there is one of that name:
    making a folder is atomic, also for several machines with a common file system.
    """

    made: Path | None = None  # the topmost folder that this process has made for the run

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        RunFolder.made = None
        if not is_main_process():
            return
        with exit_on_bad_input():
            folder = Path(str(config.hydra.run.dir))
            try:
                missing = topmost_missing(folder)
                if "${now:" in str(OmegaConf.to_container(config.hydra.run)["dir"]):
                    folder = make_unique(folder)
                    RunFolder.made = missing or folder
                    with read_write(config.hydra), open_dict(config.hydra):
                        config.hydra.run.dir = str(folder).replace("${", "\\${")
                elif make(folder):
                    RunFolder.made = missing
            except OSError as error:
                remove_made(folder)
                raise ConfigError(
                    f"hydra.run.dir={folder}: {error.strerror}; allowed is a folder that this "
                    "process may make or write to"
                ) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(str(config.hydra.sweep.dir))
        with exit_on_bad_input():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"study: {folder}: {error.strerror}; allowed is a folder that this process may "
                    "make or write to"
                ) from error


def is_main_process() -> bool:
    """Whether this is the first process of the first node."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return rank_zero_only.rank == 0 and node == "0"


def topmost_missing(folder: Path) -> Path | None:
    """The first folder on the way to `folder` that does not exist."""
    folder = folder.absolute()
    parents = reversed([folder, *folder.parents])
    return next((path for path in parents if not path.exists()), None)


def make(folder: Path) -> bool:
    """Makes `folder`; False where there was one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def make_unique(folder: Path) -> Path:
    """Makes `folder`, or the first free one of `folder-2`, `folder-3`, ..."""
    number, path = 1, folder
    while path.is_file() or not make(path):
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


@contextmanager
def held(cfg: DictConfig) -> Iterator[None]:
    """Holds the folder of the run `cfg` for this process alone.

    What was made of it goes again where training has not begun. Raises ConfigError for a folder
    that another process holds, or that has results of a run that is not the one resumed.
    """
    folder = Path(cfg.paths.output_dir)
    new_lock = not (folder / "lock").exists()
    accepted = mine = False
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
            (folder / "lock").unlink(missing_ok=True)
        if mine and not started:
            remove_made(folder)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process alone holds the folder, until the end of the context or its own end."""
    if not is_main_process():  # what the first process claims is claimed for all
        yield True
        return
    with output_errors(folder / "lock"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def check_owner(folder: Path, cfg: DictConfig) -> None:
    """Raises ConfigError where the folder has results of another run than the one resumed."""
    resumed = None if cfg.ckpt_path is None else run_folder(Path(str(cfg.ckpt_path)))
    if resumed is not None and resumed.resolve() == folder.resolve():
        check_unchanged(folder, cfg)
    elif has_results(folder):
        if cfg.ckpt_path is not None:
            load_checkpoint(cfg.ckpt_path)
        raise ConfigError(
            f"hydra.run.dir={folder}: it holds the results of a run; allowed is another folder, or "
            f"ckpt_path={folder} to resume that run"
        )


def has_results(folder: Path) -> bool:
    """Whether a run has measured something in `folder`."""
    return any((folder / name).exists() for name in RESULTS)


def remove_made(folder: Path) -> None:
    """Removes what this process has made of the path to `folder`, as far as it is empty above."""
    made, RunFolder.made = RunFolder.made, None
    if made is None:
        return
    folder = folder.absolute()
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
    for path in (p for p in folder.parents if p == made or made in p.parents):
        with suppress(OSError):  # another run has made its folder there
            path.rmdir()


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Writes `.hydra/`, as Hydra itself would before the run is checked."""
    hydra = HydraConfig.instance().cfg
    if hydra is None:
        return
    parts = {
        "config": OmegaConf.to_yaml(cfg),
        "hydra": OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra.hydra})),
        "overrides": OmegaConf.to_yaml(hydra.hydra.overrides.task),
    }
    for name, text in parts.items():
        write_text(folder / ".hydra" / f"{name}.yaml", text)
