"""Runs model-written scikit-learn programs where they can do no harm and see no labels."""

from etpo.environments.sandbox.client import Split
from etpo.environments.sandbox.pool import Outcome, Sandbox

__all__ = ["Outcome", "Sandbox", "Split"]
