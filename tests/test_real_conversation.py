"""A conversation of several turns with a pretrained model, through the whole loop.

`make pretrained` fetches the model into ETPO_CACHE.
"""

import os
from pathlib import Path

import gymnasium
import pytest
from hydra import compose, initialize_config_dir

from etpo import train
from etpo.config import CONF
from etpo.environments.text_env import AnyText

CACHE = Path(os.environ.get("ETPO_CACHE", "~/.cache/etpo")).expanduser()
SMALL = (
    "trainer.max_epochs=1",
    "rollout.num_envs=2",
    "rollout.actions_per_iteration=6",
    "rollout.minibatch_size=3",
    "rollout.update_epochs=1",
    "rollout.max_new_tokens=8",
    "model.gradient_checkpointing=false",
    "model.max_prompt_tokens=256",
    "model/lora=r16",
    "critic=frozen_trunk",
)


class Sums(gymnasium.Env):
    """Asks for three sums of two digits."""

    observation_space = action_space = AnyText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.ask(), {}

    def ask(self):
        self.digits = self.np_random.integers(0, 10, 2).tolist()
        return "{}+{} =".format(*self.digits)

    def step(self, action):
        right, self.count = action == str(sum(self.digits)), self.count + 1
        return self.ask(), float(right), self.count == 3, False, {}

    def examples(self, count):
        return [(f"2+{i} =", str(2 + i)) for i in range(count)]


gymnasium.register("test/RealSums-v0", entry_point=Sums)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "overrides"),
    [
        ("chat", ("model.stop_strings=[]", "model.prompt.system=Answer with a number.")),
        ("completion", (r"model.stop_strings=['\n']",)),
    ],
)
def test_a_pretrained_model_reads_its_own_tokens_of_earlier_turns(tmp_path, form, overrides):
    folder = CACHE / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}: make pretrained")
    settings = (
        *("model=causal_lm", f"model/prompt={form}", f"model.name_or_path={folder}"),
        *("environment=gymnasium", "environment.id=test/RealSums-v0", "environment.examples=2"),
        *("environment.history=all", "environment.answer=last_line"),
        *(f"paths.output_dir={tmp_path}", "study=none", *SMALL, *overrides),
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(settings))
    summary, trainer = train.train(cfg)
    assert summary["status"] == "finished"
    policy, actions = trainer.lightning_module.policy, trainer.datamodule.rollout.actions
    examples = set()
    for row in range(6):
        prompt = actions.prompt_ids[row][actions.prompt_mask[row]].tolist()
        shown = policy.tokenizer.decode(prompt)
        examples.add(shown[: shown.index("2+1 =") + 5])
        assert shown.count("2+1 =") == 1
        if row > 1:
            before = actions.prompt_ids[row - 2][actions.prompt_mask[row - 2]].tolist()
            action = actions.action_ids[row - 2][actions.action_mask[row - 2]].tolist()
            if action[-1] in policy.stop_ids and form == "completion":
                action.pop()
            assert prompt[: len(before) + len(action)] == before + action
    assert len(examples) == 1
