"""Run untrusted scikit-learn programs without access to the machine or to test labels."""

from etpo_sandbox.client import Split
from etpo_sandbox.pool import Outcome, Sandbox, SandboxError

__all__ = ["Outcome", "Sandbox", "SandboxError", "Split"]
