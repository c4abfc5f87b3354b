"""Console scripts: one decorator with Hydra's command line, one-line errors and exit codes."""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from etpo import runtime
from etpo.config import CONF, renamed
from etpo.errors import ConfigError, EnvironmentFailure, OutputError, error_line, first_cause
from etpo.overrides import split_arguments
from etpo.resume import CheckpointInConfig

TRACEBACK = "HYDRA_FULL_ERROR"  # with this variable the scripts show tracebacks
Arguments = Callable[[Sequence[str]], list[str]]


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Move Hydra's flags before the overrides: argparse refuses overrides on both sides."""
    flags, overrides = split_arguments(arguments)
    return [*flags, *(given.input_line for given in overrides)]


def console_script(config_name: str, arguments: Arguments = flags_first) -> Callable[..., Any]:
    """Make a console script of a function that takes the composed configuration.

    config_name: file of conf/. arguments: maps the command line to Hydra's. The script exits with 2
    and one line after bad input, with 1 after a failure, with 130 after Ctrl-C, with 143 after
    SIGTERM.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def script() -> None:
            runtime.silence_libraries()
            runtime.keep_freed_memory()
            with runtime.signals_end_process(), exit_on_error():
                compose_and_run(config_name, arguments, task)

        return script

    return decorate


def compose_and_run(config_name: str, arguments: Arguments, task: Callable[..., Any]) -> None:
    """Let Hydra compose the configuration and call `task`; again if it names a checkpoint."""
    sys.argv[1:] = arguments(sys.argv[1:])
    shown = os.environ.get(TRACEBACK)

    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        with traceback_variable(shown), exit_on_error():
            return task(cfg)

    try:
        with traceback_variable("1"):  # Hydra raises its exceptions instead of printing them
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except CheckpointInConfig as found:
        sys.argv.append(found.override)
        compose_and_run(config_name, arguments, task)
    except HydraException as error:
        raise ConfigError(composition_error(error)) from error
    except OSError as error:  # of the run's folder
        raise ConfigError(
            f"hydra.run.dir, study: {error.filename}: {error.strerror}; allowed is a folder that "
            "this process may make or write to"
        ) from error
    except ValueError as error:
        if "No trials are completed" not in str(error):
            raise
        from etpo.run_folder import RunFolder
        from etpo.studies.multirun import StudyReport

        print("error: no trial of the search has a result", file=sys.stderr)
        StudyReport().on_multirun_end(RunFolder.multirun)
        sys.exit(1)


@contextmanager
def traceback_variable(value: str | None) -> Iterator[None]:
    """Set HYDRA_FULL_ERROR, or remove it with None, and restore it afterwards."""
    before = os.environ.pop(TRACEBACK, None)
    os.environ |= {} if value is None else {TRACEBACK: value}
    try:
        yield
    finally:
        os.environ.pop(TRACEBACK, None)
        os.environ |= {} if before is None else {TRACEBACK: before}


def composition_error(error: Exception) -> str:
    """Return Hydra's message about a configuration in one line, without links."""
    text = str(error).partition("Config search path:")[0]
    lines = [line.strip() for line in text.splitlines() if "See https://" not in line]
    if isinstance(error, OverrideParseException):
        lines.insert(0, f"{error.override}:")
    if "INTERVAL_SWEEP" in text:
        key = next(argument for argument in sys.argv if "interval(" in argument)
        return f"{key}: allowed is a list, or an interval with hydra/sweeper=tpe"
    return renamed(text) or " ".join(lines)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print bad input in one line on stderr and exit with 2; with 1 after an OutputError.

    Bad input is a ConfigError, also one wrapped by Hydra, and, unless HYDRA_FULL_ERROR is set, an
    exception of an environment, a constructor or OmegaConf.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(runtime.INTERRUPTED)
    except (ConfigError, OutputError, InstantiationException, OmegaConfBaseException) as error:
        cause = first_cause(error)
        whole = isinstance(cause, ConfigError | OutputError)
        whole = whole and not isinstance(cause, EnvironmentFailure)
        if not whole and TRACEBACK in os.environ:
            raise
        line = renamed(str(error)) or error_line(error)
        hint = "" if whole else f" ({TRACEBACK}=1 shows the traceback)"
        print(f"error: {line}{hint}", file=sys.stderr)
        sys.exit(1 if isinstance(cause, OutputError) else 2)
