"""Bad input: one line with the key and what is allowed, status 2, before a model is loaded."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from lightning import LightningModule

from etpo import checkpoints, evaluate, train
from etpo.config import CONF, tiny_checkpoint
from etpo.errors import ConfigError

OUT_OF_RANGE = [
    # override, words of the message
    ("environment.dataset=tictactoe", "did you mean tic_tac_toe?"),
    ("environment.dataset=csv", "environment.path"),
    ("environment.sandbox.level=nonsense", "allowed: full, bubblewrap, unsafe"),
    ("environment.sandbox.workers=0", "1 or more"),
    ("environment.mode=refine", "allowed: repair, improve, remember"),
    ("environment.protocol=held-out", "allowed: held_out, paper"),
    ("environment.max_attempts=0", "1 or more"),
    ("algorithm.beta=-0.1", "0 or more"),
    ("algorithm.beta=nan", "0 or more"),
    ("algorithm.gamma=1.5", "at most 1"),
    ("algorithm.clip=small", "above 0"),
    ("algorithm.critic_loss=l1", "huber, mse"),
    ("algorithm.logits_chunk_size=0", "1 or more"),
    ("rollout.minibatch_size=7", "multiples of 7"),
    ("rollout.minibatch_size=0", "1 or more"),
    ("rollout.minibatch_size=some", "integer"),
    ("rollout.actions_per_iteration=-64", "1 or more"),
    ("rollout.num_envs=7", "multiples of 7"),
    ("rollout.max_new_tokens=null", "integer"),
    ("rollout.update_epochs=1.5", "integer"),
    ("seed=-1", "from 0 to 4294967295"),
    ("seed=4294967296", "from 0 to 4294967295"),
    ("seed=null", "from 0 to 4294967295"),
    ("seed=true", "from 0 to 4294967295"),
    ("trainer.max_epochs=0", "1 or more"),
    ("trainer.max_epochs=many", "1 or more"),
    ("trainer.max_epochs=null", "1 or more"),
    ("trainer.gradient_clip_val=0.5", "algorithm.max_grad_norm"),
    ("trainer.gradient_clip_algorithm=value", "algorithm.max_grad_norm"),
    ("trainer.overfit_batches=1", "trainer.limit_train_batches"),
    ("model.dtype=float8", "float32, bfloat16, float16"),
    ("model.temperature=0", "above 0"),
    ("model.min_p=1.5", "at most 1"),
    ("model.max_prompt_tokens=0", "1 or more"),
    ("model.attn_implementation=slow", "eager"),
    ("model/prompt=chat", "chat template"),
    ("algorithm.doubly_robust=maybe", "true, false"),
    ("critic.hidden_size=0", "1 or more"),
    ("callbacks.credit.num_actions=0", "1 or more"),
    ("callbacks.credit.every_n_iterations=some", "integer"),
    ("ckpt_path=none.ckpt", "no such file"),
]
TOKEN_MDP = [
    ("environment.mdp.seed=-1", "from 0 to 4294967295"),
    ("environment.mdp.num_states=0", "from 1 to 100"),
    ("environment.mdp.vocabulary_size=2", "from 3 to 27"),
    ("environment.mdp.length=7", "at most 1000 texts"),
    ("environment.mdp.length=20", "from 1 to 9"),
    ("environment.mdp.length=some", "an integer"),
    ("environment.mdp.rewards=[{a:1}]", "a list of 4 mappings"),
    ("environment.mdp.rewards=[{z:1},{},{},{}]", "letters of abc"),
    ("environment.time_limit=0", "1 or more"),
    ("model.init_seed=-1", "from 0 to 4294967295"),
    ("model.vocabulary_size=2", "from 3 to 27"),
]
UNKNOWN = [
    ("algorithm.bta=1", "algorithm.bta"),
    ("+algorithm.bta=1", "bta"),
    ("temperature=1", "temperature"),
    ("model=gpt5", "tiny"),
    ("experiment=nope", "plain"),
    ("nope=1", "nope"),
    ("seed", "seed"),
    ("seed=[", "seed=["),
    ("seed=0,1", "--multirun"),
]
# of version 0.1, and the name now
OLD = [
    ("algorithm.leak=0.1", "algorithm.truncation_kl_coef"),
    ("algorithm.floor=0", "algorithm.pessimism_threshold"),
    ("+algorithm.correction=false", "algorithm.doubly_robust"),
    ("algorithm.annotation_batch=8", "not needed"),
    ("algorithm.forward_batch_size=8", "not needed"),
    ("algorithm=best_of_n", "algorithm=zero_shot"),
]

LOADING = transformers.PreTrainedModel.__init__


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):
    def build(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", build)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def refused(tmp_path, command):
    """refused(*overrides): the one line with which `etpo-train` ends."""

    def call(*overrides: object, main=train.main) -> str:
        ended = command(main, *overrides, f"hydra.run.dir={tmp_path / 'run'}")
        assert ended.status == 2, ended
        assert ended.out == ""
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
        assert not (tmp_path / "run" / "metrics.csv").exists()
        return ended.err

    return call


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


@pytest.mark.parametrize(("override", "allowed"), OUT_OF_RANGE)
def test_a_value_out_of_range(refused, override, allowed):
    line = refused(override)
    assert key_of(override).replace("/", ".") in line
    assert allowed in line


@pytest.mark.parametrize(("override", "allowed"), TOKEN_MDP)
def test_a_token_mdp_out_of_range(refused, override, allowed):
    line = refused("environment=token_mdp", "model=token_mdp", override)
    assert key_of(override) in line
    assert allowed in line


def test_the_model_of_a_token_mdp_without_one(refused):
    assert "environment.mdp.vocabulary_size" in refused("model=token_mdp")


@pytest.mark.parametrize(("override", "words"), UNKNOWN)
def test_an_unknown_key_or_option(refused, override, words):
    assert words in refused(override)


@pytest.mark.parametrize(("override", "name"), OLD)
def test_an_old_name_is_answered_with_the_new_one(refused, override, name):
    line = refused(override)
    assert key_of(override) in line
    assert name in line


def test_a_run_saved_with_an_old_name_is_not_resumed(refused, tmp_path):
    saved = tmp_path / "run" / ".hydra" / "overrides.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("- algorithm.leak=0.1\n")
    (tmp_path / "run" / "last.ckpt").touch()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    line = refused(f"ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}")
    assert "algorithm.leak is now algorithm.truncation_kl_coef" in line


def test_an_unknown_option_is_answered_with_all_that_are_known(refused):
    line = refused("model=gpt5")
    assert all(path.stem in line for path in (CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("", "header"),
        ("a,b\n1,x\n2,x\n3,x\n", "constant"),
        ("a,b\n1,7\n2,7\n3,7\n", "constant"),
        ("a,b\n1,x\n2,y\n3\n", "line 4"),
    ],
)
def test_a_csv_that_is_no_classification_task(refused, tmp_path, text, words):
    file = tmp_path / "data.csv"
    if text is not None:
        file.write_text(text)
    line = refused("environment.dataset=csv", f"environment.path={file}")
    assert "environment.path" in line
    assert words in line


def test_a_target_column_that_is_not_there(refused, tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("a,b\n" + "1,x\n2,y\n" * 20)
    line = refused("environment.dataset=csv", f"environment.path={file}", "environment.target=c")
    assert "environment.target=c" in line


@pytest.mark.parametrize("kind", ["empty folder", "no folder", "hub id", "text file", "no weights"])
def test_a_model_path_that_is_no_model(refused, tmp_path, kind):
    path = tmp_path / "model"
    if kind == "empty folder":
        path.mkdir()
    if kind == "text file":
        path.write_text("model")
    if kind == "hub id":
        path = "nobody/no-model"
    if kind == "no weights":
        path.mkdir()
        for file in Path(tiny_checkpoint()).iterdir():
            if file.suffix != ".safetensors":
                (path / file.name).write_bytes(file.read_bytes())
    line = refused(f"model.name_or_path={path}")
    assert f"model.name_or_path={path}" in line
    assert "hub id or a folder" in line


def test_a_model_that_has_no_default(refused):
    assert "model.name_or_path" in refused("model=causal_lm")


def test_a_checkpoint_that_is_none(refused, tmp_path):
    file = tmp_path / "last.ckpt"
    file.write_text("nothing")
    assert f"ckpt_path={file}" in refused(f"ckpt_path={file}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "ckpt_path"),
        (("ckpt_path=/none.ckpt",), "ckpt_path=/none.ckpt: no such file"),
        (("ckpt_path={last}", "overrides=seed"), "overrides=seed"),
        (("ckpt_path=none.ckpt",), "ckpt_path=none.ckpt: no such file"),
        (("ckpt_path={last}", "samples=0"), "samples=0: allowed is 1 or more"),
        (("ckpt_path={last}", "seed=-1"), "seed=-1"),
        (("ckpt_path={last}", "seed=some"), "seed=some"),
        (("ckpt_path={last}", "overrides=['environment.nope=3']"), "environment.nope"),
        (("ckpt_path={last}", "nope=1"), "nope"),
    ],
)
def test_evaluate_refuses_in_one_line(refused, finished_run, arguments, words):
    last = finished_run.folder / "checkpoints" / "last.ckpt"
    line = refused(*(a.format(last=last) for a in arguments), main=evaluate.main)
    assert words in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.devices=0", ("trainer", "devices")),
        ("trainer.precision=31", ("trainer", "precision")),
        ("algorithm.gamma=${nope}", ("algorithm.gamma", "nope")),
    ],
)
def test_a_value_that_only_a_constructor_knows(refused, override, words):
    line = refused(override)
    assert all(word in line for word in words)
    assert "HYDRA_FULL_ERROR=1" in line


@pytest.mark.parametrize(
    ("state", "words"),
    [({"weight": torch.zeros(5, 2)}, "other shapes"), ({"scale": torch.zeros(3)}, "weight scale")],
)
def test_the_weights_of_another_model(state, words):
    with pytest.raises(ConfigError, match=f"ckpt_path=last.ckpt.*{words}"):
        checkpoints.load_weights(torch.nn.Linear(2, 3), state, "last.ckpt")


@pytest.mark.parametrize("override", ["model.name_or_path={llama}", "critic=full"])
def test_a_run_cannot_go_on_with_another_model(
    override, refused, finished_run, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", LOADING)
    last = shutil.copy(finished_run.folder / "checkpoints" / "last.ckpt", tmp_path)
    line = refused(f"ckpt_path={last}", override.format(llama=checkpoint("llama")))
    assert line.startswith(f"error: ckpt_path={last}: ")
    assert "model=" in line


def test_a_run_does_not_go_on_from_weights_alone(command, finished_run):
    best = finished_run.folder / "checkpoints" / "best.ckpt"
    files = {f: f.read_bytes() for f in finished_run.folder.rglob("*.c*") if f.is_file()}
    ended = command(train.main, f"ckpt_path={best}", "trainer.max_epochs=4")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(f"error: ckpt_path={best}: ")
    assert "last.ckpt" in ended.err
    assert ended.err.count("\n") == 1
    assert files == {f: f.read_bytes() for f in files}


@pytest.mark.parametrize(
    ("state", "strange"),
    [
        ({"weight": torch.zeros(5, 2)}, "weight"),
        ({"weight": torch.zeros(3, 2), "scale": torch.zeros(3)}, "scale"),
        ({}, "weight"),
    ],
)
def test_a_checkpoint_holds_what_the_module_would_write(state, strange):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3, 2))
            self.frozen = torch.nn.Parameter(torch.zeros(7))

        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["frozen"]

    with pytest.raises(ConfigError, match=rf"ckpt_path=last.ckpt.*\({strange}\)"):
        checkpoints.check_fits(Module(), {"state_dict": state}, "last.ckpt")


def test_a_gpu_that_is_not_there(refused):
    assert "trainer" in refused("trainer=gpu", "trainer.devices=64")


@pytest.mark.parametrize(
    ("script", "argument"),
    [
        ("etpo-train", "environment.path=none.csv"),
        ("etpo-report", "study=none"),
        ("etpo-evaluate", "ckpt_path=none.ckpt"),
    ],
)
def test_the_console_scripts_end_at_once(script, argument, tmp_path):
    csv = ["environment.dataset=csv"] if script == "etpo-train" else []
    ended = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            Path(sys.executable).with_name(script),
            *csv,
            argument,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    imports = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    (line,) = set(ended.stderr.splitlines()) - {*imports}
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert argument in line
    assert not [i for i in imports if i.split("|")[-1].strip() in ("torch", "transformers")]


@pytest.mark.parametrize(
    "script", ["etpo-train", "etpo-report", "etpo-score", "etpo-evaluate", "etpo-export"]
)
def test_help_loads_no_pytorch(script):
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", Path(sys.executable).with_name(script), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith(script)
    assert not re.search(r"\| +torch$", shown.stderr, re.MULTILINE)
