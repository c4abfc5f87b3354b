"""The W&B sweeps: valid to W&B, their commands overrides of a run, their metric logged by it."""

import csv

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from etpo import train
from etpo.config import CONF

from ..composed import composed

pytest.importorskip("sweeps.config")
from sweeps import next_run, schema_violations_from_proposed_config

SWEEPS = sorted((CONF / "sweep" / "wandb").glob("*.yaml"))


@pytest.fixture(params=SWEEPS, ids=lambda file: file.stem)
def sweep(request):
    return yaml.safe_load(request.param.read_text())


def drawn(sweep) -> tuple[dict, list[str]]:
    """The parameters of a sweep's first run, and the command with which an agent starts it."""
    args = next_run(sweep, [], validate=False).config
    macros = {
        **create_sweep_command_args({"args": args}),
        "env": ["/usr/bin/env"],
        "program": [sweep["program"]],
    }
    lists = (macros[c[2:-1]] if c[0] == "$" and c[-1] == "}" else [c] for c in sweep["command"])
    return {key: value["value"] for key, value in args.items()}, [part for c in lists for part in c]


def test_there_is_a_sweep_of_each_method():
    methods = [yaml.safe_load(file.read_text())["method"] for file in SWEEPS]
    assert sorted(methods) == ["bayes", "grid", "random"]


def test_a_sweep_is_valid_to_wandb(sweep):
    assert schema_violations_from_proposed_config(sweep) == []
    assert schema_violations_from_proposed_config(sweep | {"method": "best"})


def test_each_parameter_is_an_override(sweep, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    parameters, (env, program, *overrides) = drawn(sweep)
    assert (env, program) == ("/usr/bin/env", "etpo-train")
    cfg = composed("train", overrides)
    assert parameters.keys() == sweep["parameters"].keys()
    for key, value in parameters.items():
        assert OmegaConf.select(cfg, key) == value
    assert cfg.hydra.run.dir == "logs/train/wandb/r1"


def test_the_metric_is_logged(sweep, finished_run):
    with (finished_run.folder / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert all(row[sweep["metric"]["name"]] for row in rows)


def test_seeds_share_a_group_and_other_values_do_not(sweep):
    _, (_, _, *overrides) = drawn(sweep)
    groups = {
        other: composed("train", [*overrides, other]).logger.wandb.group
        for other in ("seed=7", "seed=8", *(f"{k}=0.5" for k in sweep["parameters"] if k != "seed"))
    }
    assert groups["seed=7"] == groups["seed=8"]
    assert len(set(groups.values())) == len(groups) - 1


@pytest.mark.slow
def test_the_command_of_an_agent_trains(sweep, command, tmp_path, monkeypatch):
    asked, init = [], wandb.init

    def observed(**kwargs):
        asked.append(kwargs)
        return init(**kwargs)

    monkeypatch.setattr(wandb, "init", observed)
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODE": "offline", "SWEEP_ID": "s1", "RUN_ID": "r1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    _, (_, _, *overrides) = drawn(sweep)
    ended = command(train.main, *overrides, "debug=fast", "environment.n_splits=1")
    assert ended.status == 0, ended.err
    assert (tmp_path / "logs" / "train" / "wandb" / "r1" / "summary.json").exists()
    (kwargs,) = asked
    assert kwargs["tags"] == [sweep["method"]]
    assert kwargs["group"].startswith("beta_")
