"""A launcher that trains runs in parallel gives the same study as training them in sequence."""

import pytest

from etpo.studies.multirun import incomplete_reason

TWO_RUNS = (
    *("-m", "study=s", "environment.dataset=iris,csv"),  # csv fails: it has no path
    *("trainer.max_epochs=1", "rollout.num_envs=2", "rollout.actions_per_iteration=4"),
    *("rollout.minibatch_size=4", "rollout.update_epochs=1", "rollout.max_new_tokens=8"),
    *("environment.n_splits=1", "environment.sandbox.workers=1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_finished_runs_are_skipped_and_failed_ones_reported(launcher, start_train, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    study = tmp_path / "logs" / "train" / "multiruns" / "s"
    summaries = []
    for _ in range(2):
        process = start_train(tmp_path, *TWO_RUNS, f"hydra/launcher={launcher}")
        out, err = process.communicate(timeout=600)
        assert process.returncode == 1, err
        assert "1 runs finished, 0 not finished" in out
        runs = (file.parent for file in study.glob("*/study_config.json"))
        failed, finished = sorted(runs, key=lambda run: not is_failed(run))
        reported = f"{failed.relative_to(tmp_path)}/failed.txt: environment.path"
        assert f"  failed: {reported}" in out
        summaries.append((finished / "summary.json").read_bytes())
    assert summaries[0] == summaries[1]  # training again would take another time


def is_failed(run) -> bool:
    return (incomplete_reason(run) or "").startswith("failed")
