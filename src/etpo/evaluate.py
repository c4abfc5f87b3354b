"""`etpo-evaluate ckpt_path=...`: whole episodes of a checkpoint, greedy and sampled."""

import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import hydra
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import nn
from yaml import YAMLError

from etpo.algorithms.etpo import ETPO
from etpo.config import (
    CONF,
    check_missing,
    check_overrides,
    checkpoint_file,
    exit_on_bad_input,
    load_checkpoint,
    run_folder,
)
from etpo.environments import plain
from etpo.environments.text_env import TextVectorEnv
from etpo.errors import MAX_SEED, ConfigError, check_integer, described
from etpo.files import write_text
from etpo.generation.sampler import decode_actions, generate
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.datamodule import derived_seed
from etpo.rollout.types import Record
from etpo.run_folder import remove_made
from etpo.train import quiet


def saved_config(ckpt_path: str, overrides: list[str]) -> DictConfig:
    """The configuration of the run that wrote `ckpt_path`, with `overrides` on top.

    Its `paths.output_dir` is the run's folder. Raises ConfigError where that folder's
    `.hydra/config.yaml` is missing or cannot be read.
    """
    file = checkpoint_file(ckpt_path)
    folder = run_folder(file) or file.parent.parent
    config = folder / ".hydra" / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"ckpt_path={ckpt_path}: its run folder lacks {config.name} ({config})")
    try:
        cfg = OmegaConf.load(config)
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(
            f"ckpt_path={ckpt_path}: {config} cannot be read: {described(error)}"
        ) from error
    OmegaConf.set_struct(cfg, True)
    try:
        cfg.merge_with_dotlist(overrides)
    except OmegaConfBaseException as error:
        raise ConfigError(f"overrides={overrides}: {str(error).splitlines()[0]}") from error
    cfg.paths.output_dir = str(folder)
    return cfg


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], ckpt_path: str) -> None:
    """Loads what training changed; ConfigError where `state` is that of another model."""
    try:
        strange = module.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ConfigError(f"ckpt_path={ckpt_path}: its weights have other shapes") from error
    if strange:
        raise ConfigError(f"ckpt_path={ckpt_path}: the model has no weight {strange[0]}")


def play(
    policy: LanguageModelPolicy,
    environment: TextVectorEnv,
    count: int,
    *,
    max_new_tokens: int,
    max_actions: int,
    generator: torch.Generator | None,
    seed: int,
) -> list[list[Record]]:
    """`count` episodes, each to its end or to `max_actions` actions; greedy without `generator`.

    Every copy of the environment plays one episode after a `reset`: that short episodes end first
    has no influence on which ones are counted.

    Raises ConfigError for what an environment may not send (`etpo.environments.plain`).
    """
    source = f"environment {environment.task_name}"
    episodes: list[list[Record]] = []
    together = type(environment).step_part is TextVectorEnv.step_part
    while len(episodes) < count:
        size = min(environment.num_envs, count - len(episodes))
        wave: list[list[Record]] = [[] for _ in range(size)]
        first, _ = environment.reset(seed=seed + len(episodes), options={"evaluation": True})
        with plain.sent_by(source):
            observations = plain.observations(first, environment.num_envs)
        playing = np.arange(environment.num_envs) < size
        while playing.any():
            envs = np.arange(environment.num_envs) if together else np.flatnonzero(playing)
            prompts = policy.encode([observations[env] for env in envs])
            taken = generate(policy, prompts, max_new_tokens, generator)
            texts = decode_actions(policy, prompts, taken)
            step = environment.step(texts) if together else environment.step_part(texts, envs)
            with plain.sent_by(source):
                answer = plain.answer(step, len(envs))
            for row, env in enumerate(envs):
                observations[env] = answer.observations[row]
                if not playing[env]:
                    continue
                prompt = str(policy.tokenizer.decode(prompts.ids[row][prompts.mask[row]]))
                number, error = len(wave[env]) + 1, answer.errors[row]
                reward, known = answer.rewards[row], answer.cached[row]
                limited = bool(taken.length_limited[row])
                wave[env].append(
                    Record(int(env), number, prompt, texts[row], reward, error, known, limited)
                )
                ended = answer.terminated[row] or answer.truncated[row]
                playing[env] = not (ended or number == max_actions)
        episodes += wave
    return episodes


def returns_of(episodes: list[list[Record]]) -> list[float]:
    """The sum of each episode's rewards."""
    return [sum(record.reward for record in episode) for episode in episodes]


def statistics(episodes: list[list[Record]], *, has_success: bool) -> dict[str, Any]:
    """Returns and actions of episodes; null where a number is not defined.

    interval: 95%, of Student's t distribution. success_rate, where `has_success`: share of
    episodes with return 1; success_interval: 95%, after Wilson.
    """
    returns = returns_of(episodes)
    actions = [record for episode in episodes for record in episode]
    count, mean = len(returns), fmean(returns)
    error = interval = rate = rate_interval = None
    if count > 1:
        error = stdev(returns) / count**0.5
        half = float(stats.t.ppf(0.975, count - 1)) * error
        interval = [mean - half, mean + half]
    if has_success:
        found = stats.binomtest(returns.count(1.0), count)
        rate = float(found.statistic)
        rate_interval = [*map(float, found.proportion_ci(method="wilson"))]
    return {
        "episodes": count,
        "mean_actions": len(actions) / count,
        "valid_rate": fmean(record.error is None for record in actions),
        "mean_return": mean,
        "standard_error": error,
        "interval": interval,
        "success_rate": rate,
        "success_interval": rate_interval,
    }


def evaluate(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, list[list[Record]]]]:
    """Greedy and sampled episodes of a checkpoint: their statistics, and the episodes by policy.

    success_rate is defined where every return of both policies is -1, 0 or 1. The data-science task
    is played for first attempts, which are also scored on the held-out rows.
    """
    check_missing(cfg)
    check_integer("samples", cfg.samples, 1)
    check_integer("max_actions", cfg.max_actions, 1)
    check_integer("seed", cfg.seed, 0, MAX_SEED)
    if not OmegaConf.is_list(cfg.overrides):
        raise ConfigError(f"overrides={cfg.overrides}: allowed is a list, ['key=value', ...]")
    state = load_checkpoint(cfg.ckpt_path)["state_dict"]
    run = saved_config(str(cfg.ckpt_path), [str(override) for override in cfg.overrides])
    run.rollout.num_envs = min(run.rollout.num_envs, cfg.samples)
    if "max_attempts" in run.environment:
        run.environment.max_attempts = 1
    environment = instantiate(run.environment)
    module: ETPO = instantiate(run.algorithm, policy=instantiate(run.model))
    load_weights(module, state, cfg.ckpt_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.policy.to(device)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    mixed = torch.autocast(device.type, torch.bfloat16, run.trainer.precision == "bf16-mixed")
    programs = hasattr(environment, "held_out")
    name = environment.dataset.name if programs else environment.task_name
    result: dict[str, Any] = {"ckpt_path": str(cfg.ckpt_path), "environment": name}
    played: dict[str, list[list[Record]]] = {}
    try:
        for policy, source in (("greedy", None), ("sampled", generator)):
            with mixed:
                played[policy] = play(
                    module.policy,
                    environment,
                    1 if programs and source is None else cfg.samples,
                    max_new_tokens=run.rollout.max_new_tokens,
                    max_actions=cfg.max_actions,
                    generator=source,
                    seed=derived_seed(cfg.seed),
                )
        returns = {value for episodes in played.values() for value in returns_of(episodes)}
        has_success = not programs and returns <= {-1.0, 0.0, 1.0}
        for policy, episodes in played.items():
            result[policy] = statistics(episodes, has_success=has_success)
            if programs:
                texts = [environment.program_from_action(e[0].action) for e in episodes]
                scores = environment.held_out(texts)
                held_out = None if scores is None else fmean(score.reward for score in scores)
                result[policy]["held_out_reward"] = held_out
                result.setdefault("greedy_program", texts[0])
    finally:
        environment.close()
    return result, played


def result_table(result: dict[str, Any]) -> Table:
    """One row per policy; held-out rewards count a failure as -1, as every reward does."""
    programs = "greedy_program" in result
    table = Table()
    for column in ("policy", "episodes", "actions", "valid", "mean return", "95% interval"):
        table.add_column(column)
    table.add_column("mean held-out reward" if programs else "success")
    for policy in ("greedy", "sampled"):
        row = result[policy]
        interval = row["interval"] and "{:.4f} to {:.4f}".format(*row["interval"])
        last = row["held_out_reward"] if programs else row["success_rate"]
        table.add_row(
            policy,
            str(row["episodes"]),
            f"{row['mean_actions']:.1f}",
            f"{row['valid_rate']:.0%}",
            f"{row['mean_return']:.4f}",
            interval or "-",
            "-" if last is None else f"{last:.4f}" if programs else f"{last:.0%}",
        )
    return table


def report(result: dict[str, Any], played: dict[str, list[list[Record]]], folder: Path) -> None:
    """Prints the table and writes `evaluation.json` and `episodes.jsonl`.

    Raises OutputError where one cannot be written.
    """
    lines = [
        json.dumps({"policy": policy, "episode": number} | record._asdict()) + "\n"
        for policy, episodes in played.items()
        for number, episode in enumerate(episodes)
        for record in episode
    ]
    write_text(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    write_text(folder / "episodes.jsonl", "".join(lines))
    print(f"{result['environment']}: {result['ckpt_path']}")
    # as wide as the table needs: a narrow terminal or a pipe must not cut its numbers
    Console(width=200).print(result_table(result))
    if "greedy_program" in result:
        print(result["greedy_program"])
    for name in ("evaluation.json", "episodes.jsonl"):
        print(f"written: {folder / name}")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def hydra_main(cfg: DictConfig) -> None:
    quiet()
    with exit_on_bad_input():
        folder = Path(cfg.paths.output_dir)
        try:
            result, played = evaluate(cfg)
        except Exception:
            remove_made(folder)
            raise
        report(result, played, folder)


def main() -> None:
    """Console script: `etpo-evaluate ckpt_path=... [key=value ...]`."""
    with exit_on_bad_input():
        check_overrides("evaluate", sys.argv[1:])
    hydra_main()


if __name__ == "__main__":
    main()
