"""Cells that a launcher runs side by side are a study as those that run one after the other."""

import pytest

from etpo.study import shortcoming

TWO_CELLS = (
    *("-m", "study=s", "environment.dataset=iris,csv"),  # csv fails: it has no path
    *("trainer.max_epochs=1", "rollout.num_envs=2", "rollout.actions_per_iteration=4"),
    *("rollout.minibatch_size=4", "rollout.update_epochs=1", "rollout.max_new_tokens=8"),
    *("environment.n_splits=1", "environment.sandbox.workers=1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_finished_cells_are_skipped_and_failed_ones_told(launcher, start_train, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    study = tmp_path / "logs" / "train" / "multiruns" / "s"
    summaries = []
    for _ in range(2):
        process = start_train(tmp_path, *TWO_CELLS, f"hydra/launcher={launcher}")
        out, err = process.communicate(timeout=600)
        assert process.returncode == 1, err
        assert "1 cells finished, 0 not finished" in out
        failed, finished = sorted(study.glob("*/cell.json"), key=lambda f: not is_failed(f.parent))
        told = f"{failed.parent.relative_to(tmp_path)}/failed.txt: environment.path"
        assert f"  failed: {told}" in out
        summaries.append((finished.parent / "summary.json").read_bytes())
    assert summaries[0] == summaries[1]  # a cell that is run again takes another time


def is_failed(cell) -> bool:
    return (shortcoming(cell) or "").startswith("failed")
