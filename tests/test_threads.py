"""How OpenMP's threads wait for each other: set before PyTorch is loaded, unless the user did."""

import os
import subprocess
import sys

import pytest

SHOW = "import etpo, sys; assert 'torch' not in sys.modules; import torch"


@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_the_openmp_of_torch_spins_for_as_long_as_it_is_told(own, spins):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE"} | own
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], env=env, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr
