"""Every command of README.md, CONTRIBUTING.md and docs/, and every experiment, on a tiny budget.

A block of commands runs in a folder of its own, line after line. What can't run is listed here.
"""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate

from etpo import evaluate, export, report, score, sft, train
from etpo.config import CONF, check_missing

from .documented import (
    PAGES,
    ROOT,
    Command,
    blocks,
    command_of,
    commands_in_sentences,
    commands_of,
    composed,
    shown_files,
    small,
)

SCRIPTS = {
    "etpo-train": train.main,
    "etpo-evaluate": evaluate.main,
    "etpo-export": export.main,
    "etpo-report": report.main,
    "etpo-score": score.main,
    "etpo-sft": sft.main,
}
INSTALLS = "would make an environment and install packages; make -n must know it"
SERVER = "needs W&B's server; tests/sweeps checks the files and runs an agent's command"
TWO_NODES = (
    "trainer=ddp trainer.devices=4 trainer.num_nodes=2 rollout.num_envs=8 "
    "rollout.minibatch_size=8 hydra.run.dir=logs/nodes"
)
NODES = "needs several nodes with GPUs"
# the only commands that are not run, each with its reason
NOT_RUN = {
    "git clone <address of this repository> etpo": "needs the network",
    "cd etpo": "needs the clone",
    "make install": INSTALLS,
    "make train": INSTALLS,
    "make test": INSTALLS,
    "make test lint": INSTALLS,
    "make test-all": INSTALLS,
    "make attacks": INSTALLS,
    "make tokenizers": "needs the network",
    "make agent": "needs the network and 12 minutes: docs/studies/agent.md",
    "make pretrained": "needs the network; tests/test_pretrained.py",
    "etpo-train trainer=gpu model=qwen3-4b model.quantization=nf4": (
        "needs a GPU; tests/models/test_quantization.py"
    ),
    "pytest -m slow tests/models/test_architectures.py": "make test-all runs it",
    "kill -KILL PID": "test_study.py kills such a study",
    "tensorboard --logdir logs": "a server that stays",
    "etpo-train logger=wandb logger.wandb.project=NAME": "needs an account; composed",
    "etpo-train -m sweep=beta hydra/launcher=slurm hydra.launcher.partition=NAME": (
        "needs a cluster; composed, and tests/sweeps runs submitit on one machine"
    ),
    f"srun --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 etpo-train {TWO_NODES}": NODES,
    "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
    f"-m etpo.train {TWO_NODES}": NODES,
    "wandb sweep sweeps/wandb/grid.yaml": SERVER,
    "CUDA_VISIBLE_DEVICES=0 wandb agent ID": SERVER,
    "CUDA_VISIBLE_DEVICES=1 wandb agent ID": SERVER,
}
PROGRAM = """from sklearn.tree import DecisionTreeClassifier
def build_model(x_train, y_train):
    return DecisionTreeClassifier(max_depth=3).fit(x_train, y_train)
"""
ROWS = "".join(f"{i % 7},{i % 3},{'yes' if i % 7 > 3 else 'no'}\n" for i in range(60))
# files that commands expect, besides those that the pages show
FILES = {
    "my.csv": f"a,b,label\n{ROWS}",
    "my_program.py": PROGRAM,
    "my_examples.jsonl": '{"prompt": "What is 1 + 2?", "answer": "3"}\n' * 4,
    "models.csv": "name,big_model,big_model_std\ntic_tac_toe,0.9,0.01\n",
}
# arguments that need an extra of this package
EXTRAS = {
    "hydra/sweeper=tpe": "hydra_plugins.hydra_optuna_sweeper",
    "hydra/launcher=joblib": "hydra_plugins.hydra_joblib_launcher",
    "hydra/launcher=slurm": "hydra_plugins.hydra_submitit_launcher",
    "environment=textarena": "textarena",
    "experiment=textarena": "textarena",
    "experiment=reasoning_gym": "reasoning_gym",
}
TINY_RUN = ("trainer.max_epochs=1", "rollout.num_envs=2", "rollout.actions_per_iteration=4")
TINY_RUN += ("rollout.minibatch_size=4", "rollout.max_new_tokens=8", "rollout.update_epochs=1")
TINY_RUN += ("environment.n_splits=1", "environment.sandbox.workers=1")
LORA = "{r:4,lora_alpha:8,target_modules:[q_proj,v_proj],task_type:CAUSAL_LM}"
BLOCKS = {block.name: block.commands for block in blocks()}
COMMANDS = {c.text: c for commands in BLOCKS.values() for c in commands}
ALL = COMMANDS | {c.text: c for c in commands_in_sentences()}
RUN_BLOCKS = [name for name, commands in BLOCKS.items() if {c.text for c in commands} - {*NOT_RUN}]
SHOWN_ALGORITHMS = sorted(
    Path(name).stem for name in shown_files() if re.search(r"algorithm/\w+\.yaml$", name)
)
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def test_a_script_is_read_as_a_shell_reads_it():
    script = "# c\nA=1 p 'x y' \\\n  k=<a b> # end\n\nq && r -s\n"
    assert [(c.variables, c.program, c.arguments) for c in commands_of(script)] == [
        ({"A": "1"}, "p", ["x y", "k=<a b>"]),
        ({}, "q", []),
        ({}, "r", ["-s"]),
    ]


def test_every_command_is_run_or_listed():
    """A command of another program is to be listed with the reason why it is not run."""
    assert COMMANDS
    run = {text for text, c in COMMANDS.items() if c.program in (*SCRIPTS, "python")}
    assert COMMANDS.keys() - run - NOT_RUN.keys() == set()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with the files that commands expect and copies of what they change."""
    monkeypatch.chdir(tmp_path)
    for name, content in {**FILES, **shown_files()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "studies", tmp_path / "docs" / "studies")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def skip_without_extras(command: Command) -> None:
    for argument in command.arguments:
        if argument in EXTRAS:
            pytest.importorskip(EXTRAS[argument])


@pytest.mark.parametrize("text", sorted(ALL), ids=lambda text: text[:60])
def test_a_command_is_valid_as_it_stands(text, folder):
    """It composes, no value is missing, its sizes fit; make knows the target."""
    command = ALL[text]
    if command.program == "make":
        make = ["make", "-n", *command.arguments]
        subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    if command.program == "wandb" and command.arguments[0] == "sweep":
        assert (ROOT / command.arguments[1]).is_file()
    if command.program not in SCRIPTS:
        return
    skip_without_extras(command)
    cfg = composed(command)
    del cfg.hydra
    if command.program == "etpo-train" and cfg.ckpt_path is None:
        check_missing(cfg)
        environment = SimpleNamespace(num_envs=cfg.rollout.num_envs)
        instantiate(cfg.rollout, environment=environment).check_sizes(cfg.trainer.devices)


@pytest.fixture(scope="session")
def finished_study(start_train, tmp_path_factory) -> Path:
    """The folder of a small study of two algorithms."""
    cwd = tmp_path_factory.mktemp("study")
    process = start_train(cwd, "-m", "study=s", "algorithm=etpo,ppo_kl", *TINY_RUN)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return cwd / "logs" / "train" / "multiruns" / "s"


class Runner:
    """Runs documented commands in the working folder, after what they build on is put there."""

    def __init__(self, folder, command, checkpoint, start_train, request, monkeypatch):
        self.folder, self.command, self.checkpoint = folder, command, checkpoint
        self.start_train, self.request, self.monkeypatch = start_train, request, monkeypatch

    def run(self, command: Command) -> str:
        """What it printed."""
        skip_without_extras(command)
        for name, value in command.variables.items():
            self.monkeypatch.setenv(name, value)
            if name == "PYTHONPATH":
                self.monkeypatch.syspath_prepend(self.folder / value)
        arguments = [self.filled(a, command) for a in command.arguments]
        method = getattr(self, command.program.replace("-", "_"))
        return method(command._replace(arguments=arguments))

    def filled(self, argument: str, command: Command) -> str:
        """An argument with something real in place of its placeholder."""
        if "<time>" in argument:
            argument = argument.replace("<time>", self.a_run("merge=false" in command.arguments))
        if "<id or folder>" in argument:
            family = "qwen-instruct" if "model/prompt=chat" in command.arguments else "llama"
            argument = argument.replace("<id or folder>", str(self.checkpoint(family)))
        assert not re.search("<(?!/)", argument), (
            f"{argument}: a placeholder without anything in its place"
        )
        return argument

    def a_run(self, lora: bool) -> str:
        """The name of a finished run in the working folder."""
        name = "with_lora" if lora else "of_all_weights"
        place = self.folder / "logs" / "train" / "runs" / name
        if lora and not place.exists():
            self.called(train.main, *TINY_RUN, f"model.lora={LORA}", f"hydra.run.dir={place}")
        elif not place.exists():
            shutil.copytree(self.request.getfixturevalue("finished_run").folder, place)
        return name

    def called(self, main, *arguments: str) -> str:
        ended = self.command(main, *arguments)
        assert ended.status == 0, ended.err
        return ended.out

    def etpo_train(self, command: Command) -> str:
        resumed = [a.partition("=")[2] for a in command.arguments if a.startswith("ckpt_path=")]
        if resumed:  # its sizes are those of its run
            done = torch.load(resumed[0])["epoch"] + 1
            return self.called(train.main, *command.arguments, f"trainer.max_epochs={done + 1}")
        arguments = small(command, self.checkpoint)
        if "trainer=ddp_cpu" in arguments or any("launcher" in a for a in arguments):
            process = self.start_train(self.folder, *arguments)  # it starts further processes
            out, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
        else:
            out = self.called(train.main, *arguments)
        if "-m" in arguments:
            assert re.search(r"[1-9]\d* runs finished, 0 not finished", out)
        else:
            assert re.search("(Finished|Stopped) after 1 iterations", out)
        return out

    def etpo_evaluate(self, command: Command) -> str:
        out = self.called(evaluate.main, *command.arguments, "samples=2")
        assert "evaluation.json" in out
        return out

    def etpo_export(self, command: Command) -> str:
        return self.called(export.main, *command.arguments)

    def etpo_sft(self, command: Command) -> str:
        arguments = small(command, self.checkpoint)
        return self.called(sft.main, *arguments, "data.num_programs=4", "data.min_return=null")

    def etpo_report(self, command: Command) -> str:
        multiruns = self.folder / "logs" / "train" / "multiruns"
        studies = next((a for a in command.arguments if a.startswith("study=")), "study=")
        for name in re.findall(r"\w+", studies.partition("=")[2]):
            if not (multiruns / name).exists():
                shutil.copytree(self.request.getfixturevalue("finished_study"), multiruns / name)
        out = self.called(report.main, *command.arguments)
        (written,) = re.findall(r"^written to (.*): index.html", out, re.MULTILINE)
        assert (self.folder / written / "index.html").is_file()
        return out

    def etpo_score(self, command: Command) -> str:
        out = self.called(score.main, *command.arguments)
        assert json.loads(out)["error"] is None
        return out

    def python(self, command: Command) -> str:
        if command.arguments[0] == "-m":
            module, *arguments = command.arguments[1:]
            if module == "etpo.models.tiny.build":
                arguments += ["--steps", "1", "--samples", "4", "--batch-tokens", "256"]
            return self.called(lambda: runpy.run_module(module, run_name="__main__"), *arguments)
        script, *arguments = command.arguments
        return self.called(lambda: runpy.run_path(script, run_name="__main__"), *arguments)


@pytest.fixture
def runner(folder, command, checkpoint, start_train, request, monkeypatch) -> Runner:
    return Runner(folder, command, checkpoint, start_train, request, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_BLOCKS)
def test_the_commands_of_a_block_run(name, runner):
    """`Runner` asserts that each exits with 0 and that one that trains came to its end."""
    for one in BLOCKS[name]:
        if one.text not in NOT_RUN:
            runner.run(one)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_trains(experiment, runner):
    out = runner.run(command_of(["etpo-train", f"experiment={experiment}"]))
    assert re.search(r"Finished after 1 iterations|[1-9]\d* runs finished, 0 not finished", out)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SHOWN_ALGORITHMS)
def test_the_algorithms_shown_learn_in_the_environment_shown(algorithm, runner):
    runner.monkeypatch.syspath_prepend(runner.folder)
    own = ("--config-dir", "my_conf", f"algorithm={algorithm}", "environment=gymnasium")
    sizes = ("trainer.max_epochs=4", "rollout.update_epochs=4", "critic=frozen_trunk")
    runner.called(train.main, *own, "environment.id=my_task:MyTask-v0", *sizes, "hydra.run.dir=run")
    summary = json.loads((runner.folder / "run" / "summary.json").read_text())
    assert summary["last_mean_reward"] > summary["first_mean_reward"] + 0.1


def anchors(page: Path) -> set[str]:
    """What a link may name in a page: its headings, as GitHub spells them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
