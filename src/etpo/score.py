"""`etpo-score PROGRAM.py`: one program file, scored as the data-science task scores an action."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from etpo.config import check_missing, check_overrides, exit_on_bad_input
from etpo.errors import ConfigError
from etpo.train import quiet


def score(program: str, cfg: DictConfig) -> dict[str, Any]:
    """Reward, ROC AUC by split, error, CPU seconds and sandbox level of a program's text."""
    check_missing(cfg)
    environment = instantiate(cfg.environment)
    try:
        trial = environment.scorer.trial(program)
        return {**trial._asdict(), "sandbox": environment.sandbox_level}
    finally:
        environment.close()


def read_program(path: str) -> str:
    """The text of a file, or of standard input for `-`; ConfigError where it cannot be read."""
    try:
        if path == "-":
            return sys.stdin.read()
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"PROGRAM={path}: allowed is a UTF-8 text file or - ({error})") from error


def arguments(given: Sequence[str]) -> tuple[str, list[str]]:
    """The program's path and the overrides."""
    parser = argparse.ArgumentParser(
        prog="etpo-score",
        description="Scores a file that defines build_model(x_train, y_train) in the sandbox and "
        "prints one line of JSON: reward, split_aucs, error, cpu_seconds, sandbox.",
    )
    parser.add_argument("program", metavar="PROGRAM.py", help="the file, or - for standard input")
    parser.add_argument("overrides", nargs="*", metavar="environment.key=value")
    parsed = parser.parse_args(given)
    return parsed.program, parsed.overrides


def main() -> None:
    """Console script: `etpo-score PROGRAM.py [environment.key=value ...]`."""
    quiet()
    with exit_on_bad_input():
        path, overrides = arguments(sys.argv[1:])
        cfg = check_overrides("score", overrides)
        del cfg.hydra
        print(json.dumps(score(read_program(path), cfg)))


if __name__ == "__main__":
    main()
