"""GGUF files: weights, configuration and tokenizer of a model in one file, dequantised."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from etpo.errors import ConfigError


def is_gguf(name_or_path: str | Path) -> bool:
    """Return whether a name has the suffix of a GGUF file."""
    return Path(name_or_path).suffix.lower() == ".gguf"


def check_gguf(name_or_path: str) -> None:
    """Raise ConfigError if a GGUF file or the package that reads it is missing."""
    key = f"model.name_or_path={name_or_path}"
    if is_gguf(name_or_path) and not Path(name_or_path).is_file():
        raise ConfigError(f"{key}: there is no such file; allowed is a GGUF file")
    if is_gguf(name_or_path) and find_spec("gguf") is None:
        raise ConfigError(f"{key}: a GGUF file needs the package gguf: pip install 'etpo[gguf]'")


@contextmanager
def location(name_or_path: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments by which `from_pretrained` finds a hub id, a folder or a GGUF file.

    A GGUF file is linked into an empty folder, because transformers would add the tokens of a
    tokenizer in the same folder.
    """
    if not is_gguf(name_or_path):
        yield {"pretrained_model_name_or_path": name_or_path}
        return
    file = Path(name_or_path).resolve()
    with TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file)
        yield {"pretrained_model_name_or_path": folder, "gguf_file": file.name}


def dequantisation(name_or_path: str) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` turns the weights of a file to floats."""
    if not is_gguf(name_or_path):
        return {}
    from transformers import GgufConfig  # since transformers 5.21

    return {"quantization_config": GgufConfig(dequantize=True)}


def check_readable(file: Path) -> None:
    """Raise ValueError unless the header of a GGUF file fits its size."""
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except Exception as error:  # of struct, numpy, ...
        raise ValueError(str(error)) from error
