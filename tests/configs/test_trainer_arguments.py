"""Arguments of Lightning's Trainer that people know, without a plus: what they do to a run."""

import json

import pytest

from etpo import train

TINY = (
    *("environment=sokoban", "model=tiny", "rollout.num_envs=2", "rollout.actions_per_iteration=4"),
    *("rollout.minibatch_size=4", "rollout.update_epochs=2", "rollout.max_new_tokens=5"),
    "trainer.max_epochs=2",
)


@pytest.fixture
def tiny_run(command, tmp_path, caplog):
    """tiny_run(*overrides): what the run printed, once it has ended well."""

    def call(*overrides):
        folder = f"hydra.run.dir={tmp_path / 'run'}"
        ended = command(train.main, *TINY, folder, *overrides)
        assert ended.status == 0, ended.err
        return ended.out + ended.err + caplog.text  # pytest may hold the handler's stream

    return call


def test_fast_dev_run_ends_in_order_and_the_profiler_prints_its_table(tiny_run, tmp_path):
    printed = tiny_run("trainer.fast_dev_run=true", "trainer.profiler=simple")
    assert "after 1 iterations, 4 actions" in printed  # the closing
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 1
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert "run_training_epoch" in printed  # a row of the table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profiler", "printed"), [("advanced", "cumtime"), ("pytorch", "CPU total")]
)
def test_other_profilers_print_their_tables(profiler, printed, tiny_run):
    assert printed in tiny_run(f"trainer.profiler={profiler}", "trainer.max_epochs=1")


@pytest.mark.slow
def test_common_arguments_act(tiny_run, tmp_path):
    printed = tiny_run(
        *("trainer.limit_train_batches=1", "trainer.limit_val_batches=0"),
        *("trainer.detect_anomaly=true", "trainer.max_time=00:01:00:00"),
        *("trainer.enable_model_summary=true", "trainer.gradient_clip_val=1.0"),
    )
    assert "Trainable params" in printed
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[1]) for row in rows[1:]]
    assert steps == [0, 1]  # of two passes an iteration the first
    assert "val/reward" not in rows[0]
