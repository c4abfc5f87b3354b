"""`etpo-export ckpt_path=... out=FOLDER`: write a checkpoint's policy as a Hugging Face folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors import SafetensorError

from etpo.config import check_missing
from etpo.console import console_script
from etpo.errors import ConfigError, reason

if TYPE_CHECKING:  # imported late, so that bad input is refused before PyTorch is loaded
    from etpo.models.policy import LanguageModelPolicy


def load_policy(ckpt_path: str) -> "LanguageModelPolicy":
    """Return the policy of the run that wrote `ckpt_path`, with the checkpoint's weights.

    Raises ConfigError if its run folder or its model is missing or does not fit.
    """
    from etpo.checkpoints import load_checkpoint, load_weights, saved_config

    state, start = load_checkpoint(ckpt_path)["state_dict"], "policy."
    weights = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    if not weights:
        raise ConfigError(f"ckpt_path={ckpt_path}: it holds no weights of a model")
    try:
        # plain lists: peft writes model.lora as JSON
        policy = instantiate(saved_config(ckpt_path, []).model, _convert_="all")()
    except OSError as error:
        raise ConfigError(
            f"ckpt_path={ckpt_path}: its model cannot be read ({reason(error)}); allowed is a run "
            "whose model is still there"
        ) from error
    load_weights(policy, weights, ckpt_path)
    return policy


@contextmanager
def folder_errors(out: Path) -> Iterator[None]:
    """Turn an error of the disk into a ConfigError that names `out`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = reason(error)
        raise ConfigError(
            f"out={out}: cannot be written ({why}); allowed is a folder with room for it"
        ) from error


def new_folder(path: str) -> Path:
    """Return the path of a new or an empty folder. Raises ConfigError for another one."""
    out = Path(path).expanduser()
    with folder_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"out={out} exists; allowed is a new or an empty folder")
    return out


def write_folder(policy: "LanguageModelPolicy", out: Path, merge: bool) -> None:
    """Write the folder `out` atomically; `policy` is unusable afterwards."""
    from etpo.models.saving import save_policy

    with folder_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            save_policy(policy, Path(folder) / out.name, merge)
            os.replace(Path(folder) / out.name, out)


def export(cfg: DictConfig) -> Path:
    """Write the folder `cfg.out` atomically and return it."""
    check_missing(cfg)
    if not isinstance(cfg.merge, bool):
        raise ConfigError(f"merge={cfg.merge}: allowed are true, false")
    out = new_folder(str(cfg.out))
    write_folder(load_policy(str(cfg.ckpt_path)), out, cfg.merge)
    return out


@console_script("export")
def main(cfg: DictConfig) -> None:
    """Console script: `etpo-export ckpt_path=... out=FOLDER [merge=false]`."""
    print(f"written: {export(cfg)}")


if __name__ == "__main__":
    main()
