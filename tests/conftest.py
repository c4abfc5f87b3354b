"""Fixtures that several folders of tests use."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets: `ETPO_DATA_DIR`, else `../shared/datasets`."""
    folder = Path(os.environ.get("ETPO_DATA_DIR", REPOSITORY.parent / "shared" / "datasets"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set ETPO_DATA_DIR")
    return folder
