"""The wait policy of OpenMP is set before PyTorch loads, unless the user set it."""

import os
import subprocess
import sys

import pytest

SHOW = "import etpo, sys; assert 'torch' not in sys.modules; import torch"


@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_openmp_spins_as_long_as_configured(own, spins):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE"} | own
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], env=env, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr
