"""The shipped worlds earn reward with their defaults, which are a pretrained model.

`make pretrained` fetches the model into ETPO_CACHE.
"""

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from etpo import pretrained, train
from etpo.config import CONF

FOLDER = pretrained.cache_dir() / "smollm2-135m"
SMALL = (
    *("trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "rollout.validation_steps=1"),
    *("rollout.num_envs=8", "rollout.actions_per_iteration=80", "rollout.minibatch_size=80"),
    "rollout.update_epochs=1",
)
# by environment: the package that it needs
WORLDS = {
    "arithmetic": "gymnasium",
    "frozen_lake": "gymnasium",
    "guess_number": "gymnasium",
    "reasoning_gym": "reasoning_gym",
    "sokoban": "gymnasium",
    "textarena": "textarena",
    "textworld": "textworld",
}


@pytest.mark.slow
@pytest.mark.parametrize("environment", WORLDS)
def test_defaults_earn_reward(environment, tmp_path):
    pytest.importorskip(WORLDS[environment])
    if not FOLDER.is_dir():
        pytest.skip(f"no model at {FOLDER}: make pretrained")
    settings = (f"environment={environment}", f"paths.output_dir={tmp_path}", *SMALL)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(settings))
    summary, _ = train.train(cfg)
    assert summary["status"] == "finished"
    assert summary["iterations"] == 2
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    assert metrics["rollout/reward"].sum() > 0
