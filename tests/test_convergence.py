"""The whole training path (Trainer, data module, ETPO, a transformer) against the exact optimum."""

import csv
import json

from etpo import train

SHORT = ("experiment=token_mdp", "trainer.max_epochs=30")


def test_oracle_real_training_comes_near_the_exact_optimum(command, tmp_path):
    ended = command(train.main, *SHORT, f"hydra.run.dir={tmp_path}")
    assert ended.status == 0, ended.err
    with (tmp_path / "metrics.csv").open(newline="") as lines:
        measured = [row for row in csv.DictReader(lines) if row["oracle/kl"]]
    first, last = measured[0], measured[-1]
    print(first, last)
