"""Token-level reinforcement learning for language agents (ETPO, arXiv 2402.06700)."""

import os

# GNU OpenMP reads these when PyTorch loads it. By default its threads wait for each other in a busy
# loop of about 3 ms, which takes the cores from the threads that they wait for when other processes
# need them too; 0.1 ms is as fast on a quiet machine (docs/benchmarks.md).
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"
