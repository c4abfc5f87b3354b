"""Optuna's sweeper, which ends with one line where no trial has a result."""

import sys

from hydra.core.plugins import Plugins
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

from etpo.studies.multirun import StudyReport


class Search(OptunaSweeper):
    """Hydra's sweeper of Optuna. Without a trial that has a result the exit status is 1."""

    def sweep(self, arguments: list[str]) -> None:
        try:
            super().sweep(arguments)
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            print("error: no trial of the search has a result", file=sys.stderr, flush=True)
            StudyReport().on_multirun_end(self.sweeper.config)
            sys.exit(1)


def register() -> None:
    """Has Hydra take `Search` for its own class, whose name it insists on."""
    name = f"{OptunaSweeper.__module__}.{OptunaSweeper.__name__}"
    Plugins.instance().class_name_to_class[name] = Search
