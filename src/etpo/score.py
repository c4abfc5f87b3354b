"""`etpo-score PROGRAM.py`: score one program file as the data-science task scores an action."""

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from etpo.config import check_missing
from etpo.console import console_script, flags_first
from etpo.errors import ConfigError
from etpo.overrides import override


def score(program: str, cfg: DictConfig) -> dict[str, Any]:
    """Return reward, ROC AUC by split, error, CPU seconds and sandbox level of a program's text."""
    with closing(instantiate(cfg.environment)) as environment:
        trial = environment.scorer.trial(program)
        return {**trial._asdict(), "sandbox": environment.sandbox_level}


def read_program(path: str) -> str:
    """Read a file, or standard input for `-`. Raises ConfigError if it cannot be read."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"program={path}: allowed is a UTF-8 text file or - ({error})") from error


def program_first(arguments: Sequence[str]) -> list[str]:
    """Turn the first argument that is a file name into `program=FILE`."""
    rest = list(arguments)
    files = (a for a in rest if a == "-" or ("=" not in a and not a.startswith("-")))
    if (file := next(files, None)) is not None:
        rest[rest.index(file)] = override("program", file)
    return flags_first(rest)


@console_script("score", program_first)
def main(cfg: DictConfig) -> None:
    """Console script: `etpo-score PROGRAM.py [environment.key=value ...]`."""
    check_missing(cfg)
    print(json.dumps(score(read_program(cfg.program), cfg)))


if __name__ == "__main__":
    main()
