"""The commands and files that README.md, CONTRIBUTING.md and docs/ show; a tiny budget for each."""

import re
import shlex
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import NamedTuple

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from etpo import score
from etpo.config import CONF

from . import composed as composing

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
# a value that is larger, or none, becomes this one
SMALL = {
    "trainer.max_epochs": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.check_val_every_n_epoch": 1,
    "rollout.num_envs": 2,
    "rollout.actions_per_iteration": 4,
    "rollout.minibatch_size": 2,
    "rollout.update_epochs": 1,
    "rollout.max_new_tokens": 8,
    "environment.group_size": 2,
    "environment.turns": 2,
    "environment.n_splits": 1,
    "environment.sandbox.workers": 1,
    "critic.hidden_size": 8,
    "hydra.sweeper.n_trials": 2,
}
# models of the hub, and the family of the small random one that takes their place
FAMILY = {
    "codellama/CodeLlama-7b-hf": "codellama",
    "Qwen/Qwen2.5-Coder-0.5B": "qwen",
    "Qwen/Qwen2.5-Coder-1.5B": "qwen",
    "Qwen/Qwen2.5-Coder-7B": "qwen",
    "${pretrained:smollm2-135m}": "smollm2",
    "logs/warm_start": "smollm2",
    "FILE.gguf": "qwen-instruct",  # tests/models/test_gguf.py
}


class Command(NamedTuple):
    """One simple command: VARIABLE=value before it, the program, its arguments."""

    variables: dict[str, str]
    program: str
    arguments: list[str]
    text: str


class Block(NamedTuple):
    """The commands of one fenced block, which may build on one another."""

    name: str  # page:line
    commands: list[Command]


def commands_of(script: str) -> list[Command]:
    """What a shell would run: comments left out, continued lines joined, `a && b` two commands.

    A placeholder as <id or folder> is one word.
    """
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        joined = re.sub(r"<[^<>]*>", lambda m: m[0].replace(" ", "\u00a0"), line)
        lexer = shlex.shlex(joined, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word != "&&":
                assert not set(word) <= set("&|;"), f"not understood: {line}"
                words.append(word.replace("\u00a0", " "))
            elif words:
                found.append(command_of(words))
                words = []
    return found


def command_of(words: list[str]) -> Command:
    count = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    variables = dict(word.split("=", 1) for word in words[:count])
    return Command(variables, words[count], words[count + 1 :], " ".join(words))


def blocks() -> list[Block]:
    """Every fenced block of commands of every page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in re.finditer(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, fence.start()) + 1
            found.append(Block(f"{page.relative_to(ROOT)}:{line}", commands_of(fence[1])))
    return found


def commands_in_sentences() -> list[Command]:
    """Those of this package and of make, as `make bench`; an abbreviated one (...) is none."""
    spans = [
        span
        for page in PAGES
        for span in re.findall(r"(?<!`)`((?:etpo-\w+|make) [^`]+)`(?!`)", page.read_text("utf-8"))
    ]
    return [c for span in spans if "..." not in span for c in commands_of(" ".join(span.split()))]


def shown_files() -> dict[str, str]:
    """Name -> content of the files that pages show: as `NAME`, a colon, and a block."""
    shown = r"\b[Aa]s\s`([\w./]+)`:\n\n```\w+\n(.*?)^```$"
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    return {n: c for t in texts for n, c in re.findall(shown, t, re.DOTALL | re.MULTILINE)}


def composed(command: Command) -> DictConfig:
    """What one of this package's commands composes to; an exception where it does not."""
    arguments = [re.sub(r"<[^<>]*>", "x", a) for a in command.arguments]
    if command.program == "etpo-score":
        arguments = score.program_first(arguments)
    return composing.composed(command.program.removeprefix("etpo-"), arguments)


def small(command: Command, checkpoint: Callable[[str], Path]) -> list[str]:
    """The arguments of an `etpo-train` on a tiny budget.

    A sweep keeps two values, of seeds one. A GPU becomes the CPU, a model of the hub the random
    `checkpoint` of its family.
    """
    cfg = composed(command)
    own = [a for a in command.arguments if "=" in a]
    kept = [a for a in command.arguments if "=" not in a]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        given = {o.get_key_element(): o for o in parser.parse_overrides(own)}
        params = (cfg.hydra.sweeper.get("params") or {}) if "-m" in kept else {}
        swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        cut = [cut_sweep(o) for o in ({o.get_key_element(): o for o in swept} | given).values()]
    for key, value in SMALL.items():
        group, _, name = key.rpartition(".")
        if name in (OmegaConf.select(cfg, group) or {}):
            present = OmegaConf.select(cfg, key)
            if (inf if present is None else present) > value:
                cut.append(f"{key}={value}")
    if cfg.trainer.accelerator == "gpu":
        cut += ["trainer=cpu", "trainer.devices=1"]
    name = OmegaConf.to_container(cfg.model)["name_or_path"]  # may name the run's own folder
    if name in FAMILY:
        cut += [f"model.name_or_path={checkpoint(FAMILY[name])}", "model.dtype=float32"]
    return [*kept, *cut]


def cut_sweep(override: Override) -> str:
    """An override with the first two values of its sweep, of seeds the first."""
    if not override.is_sweep_override() or override.is_interval_sweep():
        return override.input_line
    key, values = override.get_key_element(), list(override.sweep_string_iterator())
    return f"{key}={','.join(values[: 1 if key == 'seed' else 2])}"
