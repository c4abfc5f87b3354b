"""All ways to write `ckpt_path` mean the same, and a longer run keeps its schedules."""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from etpo import train
from etpo.algorithms.base import OnPolicyAlgorithm
from etpo.errors import ConfigError
from etpo.resume import resume_arguments

from .composed import composed

SAVED = ["environment.dataset=iris", "seed=7", "trainer.max_epochs=25", "+trainer.max_time=null"]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder with a checkpoint that is never read."""
    folder = tmp_path / "lr=0.1 (a, b) ü"
    (folder / ".hydra").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    OmegaConf.save(OmegaConf.create(SAVED), folder / ".hydra" / "overrides.yaml")
    saved = {"trainer": {"max_epochs": 25}, "schedule_iters": "${trainer.max_epochs}"}
    OmegaConf.save(OmegaConf.create(saved), folder / ".hydra" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(folder / "checkpoints" / "last.ckpt")
    (tmp_path / "runs").symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    "form",
    [
        *('ckpt_path="{run}/checkpoints/last.ckpt"', "ckpt_path='{run}/checkpoints/last.ckpt'"),
        *('++ckpt_path="{run}/checkpoints/last.ckpt"', '+ckpt_path="{run}/checkpoints/last.ckpt"'),
        *('ckpt_path="{run.name}/checkpoints/last.ckpt"', 'ckpt_path="{run}"', "ckpt_path=runs/"),
        *('ckpt_path="{run}/checkpoints"', 'ckpt_path="~/{run.name}/checkpoints/last.ckpt"'),
        *('ckpt_path="{run}/checkpoints/last.ckpt  "', "ckpt_path=link", "ckpt_path=link   "),
        'ckpt_path="${{oc.env:HOME}}/{run.name}"',
    ],
)
def test_all_ways_to_write_a_checkpoint_mean_the_same(run, form):
    arguments = resume_arguments([form.format(run=run)])
    cfg = composed("train", arguments)
    assert (cfg.environment.dataset, cfg.seed) == ("iris", 7)
    assert os.path.samefile(cfg.ckpt_path, run / "checkpoints" / "last.ckpt")
    assert os.path.samefile(cfg.hydra.run.dir, run)


def test_the_last_checkpoint_counts_and_null_is_none(run):
    cfg = composed("train", resume_arguments(["ckpt_path=null", "ckpt_path=link"]))
    assert cfg.seed == 7
    for arguments in (["ckpt_path=link", "ckpt_path=null"], ["ckpt_path=link", "ckpt_path="]):
        cfg = composed("train", resume_arguments(arguments))
        assert (cfg.seed, cfg.ckpt_path) == (0, None)


def test_a_checkpoint_of_an_experiment_file(run, tmp_path, command, monkeypatch):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    text = f"# @package _global_\nckpt_path: {tmp_path / 'link'}\n"
    (folder / "again.yaml").write_text(text)
    (run / ".hydra" / "config.yaml").unlink()  # it names nothing that identifies a run
    found = []
    monkeypatch.setattr(
        train,
        "train_and_judge",
        lambda cfg: found.append((cfg.seed, cfg.environment.dataset, cfg.paths.output_dir)),
    )
    ended = command(train.main, "--config-dir", folder.parent, "experiment=again")
    assert ended.status == 0, ended.err
    (((*kept, output_dir)),) = found
    assert kept == [7, "iris"]
    assert os.path.samefile(output_dir, run)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["ckpt_path=nowhere"], "ckpt_path=nowhere"),
        (["ckpt_path=."], "ckpt_path=."),
        (["ckpt_path=link", "hydra.run.dir=other"], "hydra.run.dir=other"),
        (["-m", "ckpt_path=link", "seed=0,1"], "ckpt_path"),
        (["ckpt_path=/x/lr=0.1/a.ckpt"], "ckpt_path"),
    ],
)
def test_what_cannot_be_resumed_is_refused(run, arguments, word):
    with pytest.raises(ConfigError, match=word):
        resume_arguments(arguments)


def test_a_new_override_takes_the_place_of_a_saved_one(run):
    cfg = composed("train", resume_arguments(["ckpt_path=link", "trainer.max_time=1"]))
    assert cfg.trainer.max_time == 1


class Scheduled(OnPolicyAlgorithm):
    """The schedules of an algorithm alone."""

    def __init__(self, iters: int, epoch: int) -> None:
        self.first_beta, self.last_beta, self.beta_anneal_iters, self.epoch = (
            0.02,
            0.005,
            iters,
            epoch,
        )

    @property
    def current_epoch(self) -> int:
        return self.epoch


def test_a_longer_run_keeps_its_schedules_and_never_steps_up(run):
    """25 iterations, then 50: the length of the first stays, unless another is given."""
    for added, iters in ([], 25), (["schedule_iters=50"], 50):
        new = ["ckpt_path=link", "trainer.max_epochs=50", *added]
        cfg = composed("train", resume_arguments(new))
        assert cfg.trainer.max_epochs == 50
        assert cfg.algorithm.beta_anneal_iters == iters
        assert cfg.algorithm.scheduler.total_iters == iters
    before = [Scheduled(25, epoch).beta for epoch in range(25)]
    after = [Scheduled(25, epoch).beta for epoch in range(25, 50)]
    assert sorted(before + after, reverse=True) == before + after


@pytest.mark.parametrize("given", ["schedule_iters=50", "++schedule_iters=50"])
def test_a_schedule_that_is_given_acts(run, given):
    lines = resume_arguments([f'ckpt_path="{run}"', given])
    assert [line for line in lines if "schedule_iters" in line] == [given]
