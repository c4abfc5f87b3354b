"""Run model-written scikit-learn programs that can do no harm and see no test labels."""

from etpo_sandbox.client import Split
from etpo_sandbox.pool import Outcome, Sandbox, SandboxError

__all__ = ["Outcome", "Sandbox", "SandboxError", "Split"]
