"""Token-level reinforcement learning for language agents (ETPO, arXiv 2402.06700)."""

import os

# Read by GNU OpenMP when PyTorch loads it: its threads spin for 0.1 ms instead of 3 ms while they
# wait, which leaves the cores to other processes (docs/benchmarks.md).
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"
