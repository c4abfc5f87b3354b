"""benchmarks/raw_runs.py: rows of several multiruns in one raw.csv."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

FILE = Path(__file__).parents[2] / "benchmarks" / "raw_runs.py"
spec = importlib.util.spec_from_file_location("raw_runs", FILE)
raw_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(raw_runs)


@pytest.fixture
def add(tmp_path):
    """add(seed, beta, status): add a run to the multirun and read all."""
    out, multirun = tmp_path / "out", tmp_path / "multirun"

    def run(seed, beta=0.1, status="finished"):
        folder = multirun / str(seed)
        (folder / ".hydra").mkdir(parents=True)
        groups = {name: {} for name in raw_runs.DECIDING}
        config = {
            **groups,
            "seed": seed,
            "paths": {"log_dir": str(folder)},
            "algorithm": {"beta": beta},
            "environment": {"target_seed": "${seed}", "cache": "${paths.log_dir}/scores"},
        }
        OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
        (folder / "summary.json").write_text(json.dumps({"status": status, "seed": seed}))
        arguments = argparse.Namespace(out=out, multirun=multirun)
        read = raw_runs.read_raw(arguments, row_of, ["method", "seed"])
        assert read.equals(
            raw_runs.read_raw(argparse.Namespace(out=out, multirun=None), row_of, [])
        )
        return read["seed"].tolist()

    run.multirun = multirun
    return run


def row_of(config, folder, summary):
    return {"method": "etpo", "seed": summary["seed"]}


def test_a_study_grows_by_seeds_of_the_same_settings(add, capsys):
    assert add(1) == [1]
    (add.multirun / "1" / "summary.json").unlink()  # on another machine
    assert add(0) == [0, 1]
    assert add(2, status="failed") == [0, 1]
    assert "is failed" in capsys.readouterr().err


def test_seeds_of_different_settings_are_refused(add):
    add(0)
    with pytest.raises(SystemExit, match=r"different settings: etpo"):
        add(1, beta=0.2)
