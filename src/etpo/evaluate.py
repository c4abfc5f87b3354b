"""`etpo-evaluate ckpt_path=...`: play whole episodes with a checkpoint, greedy and sampled."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from etpo.config import check_missing
from etpo.console import console_script
from etpo.environments import validation
from etpo.environments.conversation import make_environment
from etpo.environments.text_env import TextVectorEnv
from etpo.errors import MAX_SEED, ConfigError, check_integer
from etpo.files import write_text
from etpo.resume import checkpoint_file
from etpo.run_folder import remove_made

if TYPE_CHECKING:  # PyTorch is imported late, so that bad input is refused at once
    import torch

    from etpo.models.policy import LanguageModelPolicy
    from etpo.models.prompting import Turn
    from etpo.rollout.types import Record

    Episodes = list[list[Record]]


def play(
    policy: LanguageModelPolicy,
    environment: TextVectorEnv,
    count: int,
    *,
    max_new_tokens: int,
    max_actions: int,
    generator: torch.Generator | None,
    seed: int,
) -> Episodes:
    """Play `count` episodes to their end or to `max_actions` actions; greedy without `generator`.

    Each copy of the environment plays one episode after a `reset`, so that short episodes are not
    counted more often. Raises ConfigError for invalid values from an environment.
    """
    from etpo.generation.grammar import check_grammar
    from etpo.rollout.collector import EnvGroup

    grammar = check_grammar(environment.grammar)
    episodes: Episodes = []
    together = type(environment.unwrapped).step_part is TextVectorEnv.step_part
    while len(episodes) < count:
        size = min(environment.num_envs, count - len(episodes))
        wave: Episodes = [[] for _ in range(size)]
        observations = validation.reset(environment, seed + len(episodes), evaluation=True)
        turns: list[Turn | None] = [None] * environment.num_envs
        playing = np.arange(environment.num_envs) < size
        while playing.any():
            group = EnvGroup(np.flatnonzero(playing | together), observations, turns)
            texts = group.act(policy, max_new_tokens, generator, grammar)
            step = environment.step(texts) if together else environment.step_part(texts, group.envs)
            answer = validation.step_result(environment, step, len(texts))
            for row, record in enumerate(group.to_records(policy, answer)):
                env = record.env
                observations[env] = answer.observations[row]
                over = answer.terminated[row] or answer.truncated[row]
                turns[env] = None if over else group.turns[row]
                if playing[env]:
                    wave[env].append(record._replace(attempt=len(wave[env]) + 1))
                    playing[env] = not over and len(wave[env]) < max_actions
        episodes += wave
    return episodes


def returns_of(episodes: Episodes) -> list[float]:
    """Return the sum of each episode's rewards."""
    return [sum(record.reward for record in episode) for episode in episodes]


def statistics(episodes: Episodes, *, has_success: bool) -> dict[str, Any]:
    """Return statistics of episodes; null where a number is not defined.

    interval: 95%, of Student's t distribution. success_rate, with `has_success`: share of episodes
    with return 1; success_interval: 95%, after Wilson.
    """
    from scipy import stats

    returns = returns_of(episodes)
    actions = [record for episode in episodes for record in episode]
    count, mean = len(returns), fmean(returns)
    valid_rate = fmean(record.error is None for record in actions)
    row: dict[str, Any] = {"episodes": count, "mean_actions": len(actions) / count}
    row |= {"valid_rate": valid_rate, "mean_return": mean}
    row |= dict.fromkeys(("standard_error", "interval", "success_rate", "success_interval"))
    if count > 1:
        row["standard_error"] = error = stdev(returns) / count**0.5
        half = float(stats.t.ppf(0.975, count - 1)) * error
        row["interval"] = [mean - half, mean + half]
    if has_success:
        found = stats.binomtest(returns.count(1.0), count)
        row["success_rate"] = float(found.statistic)
        row["success_interval"] = [*map(float, found.proportion_ci(method="wilson"))]
    return row


def evaluate(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Episodes]]:
    """Play greedy and sampled episodes; return their statistics, and the episodes by policy.

    In the data-science task only first attempts are played.
    """
    check_missing(cfg)
    check_integer("samples", cfg.samples, 1)
    check_integer("max_actions", cfg.max_actions, 1)
    check_integer("seed", cfg.seed, 0, MAX_SEED)
    if not OmegaConf.is_list(cfg.overrides):
        raise ConfigError(f"overrides={cfg.overrides}: allowed is a list, ['key=value', ...]")
    checkpoint_file(cfg.ckpt_path)
    import torch

    from etpo.checkpoints import load_checkpoint, load_weights, saved_config
    from etpo.rollout.datamodule import derived_seed

    state = load_checkpoint(cfg.ckpt_path)["state_dict"]
    run = saved_config(cfg.ckpt_path, [str(override) for override in cfg.overrides])
    run.rollout.num_envs = min(run.rollout.num_envs, cfg.samples)
    if "max_attempts" in run.environment:
        run.environment.max_attempts = 1
    environment = make_environment(run.environment)
    module = instantiate(run.algorithm, policy=instantiate(run.model))
    load_weights(module, state, cfg.ckpt_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.policy.to(device)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    mixed = torch.autocast(device.type, torch.bfloat16, run.trainer.precision == "bf16-mixed")
    greedy_count = 1 if hasattr(environment, "held_out") else cfg.samples
    limits = {"max_new_tokens": run.rollout.max_new_tokens, "max_actions": cfg.max_actions}
    limits["seed"] = derived_seed(cfg.seed)
    with closing(environment):
        with mixed:
            greedy = play(module.policy, environment, greedy_count, generator=None, **limits)
            sampled = play(module.policy, environment, cfg.samples, generator=generator, **limits)
        played = {"greedy": greedy, "sampled": sampled}
        return evaluation(environment, played, str(cfg.ckpt_path)), played


def evaluation(
    environment: TextVectorEnv, played: dict[str, Episodes], ckpt_path: str
) -> dict[str, Any]:
    """Return the content of `evaluation.json`.

    success_rate is defined if every return is -1, 0 or 1. Programs are scored on held-out rows.
    """
    programs = hasattr(environment, "held_out")
    name = environment.dataset.name if programs else environment.task_name
    result: dict[str, Any] = {"ckpt_path": ckpt_path, "environment": name}
    returns = returns_of([episode for episodes in played.values() for episode in episodes])
    has_success = not programs and set(returns) <= {-1.0, 0.0, 1.0}
    for policy, episodes in played.items():
        result[policy] = statistics(episodes, has_success=has_success)
        if programs:
            texts = [environment.program_from_action(e[0].action) for e in episodes]
            scores = environment.held_out(texts)
            held_out = None if scores is None else fmean(score.reward for score in scores)
            result[policy]["held_out_reward"] = held_out
            result.setdefault("greedy_program", texts[0])
    return result


def result_table(result: dict[str, Any]) -> Table:
    """Return one row per policy; a failure counts as a held-out reward of -1."""
    key, last, form = "success_rate", "success", ".0%"
    if "greedy_program" in result:
        key, last, form = "held_out_reward", "mean held-out reward", ".4f"
    table = Table("policy", "episodes", "actions", "valid", "mean return", "95% interval", last)
    for policy in ("greedy", "sampled"):
        row = result[policy]
        table.add_row(
            *(policy, str(row["episodes"]), f"{row['mean_actions']:.1f}"),
            *(f"{row['valid_rate']:.0%}", f"{row['mean_return']:.4f}"),
            "{:.4f} to {:.4f}".format(*row["interval"]) if row["interval"] else "-",
            "-" if row[key] is None else f"{row[key]:{form}}",
        )
    return table


def report(result: dict[str, Any], played: dict[str, Episodes], folder: Path) -> None:
    """Print the table and write `evaluation.json` and `episodes.jsonl`."""
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
    print(f"written: {folder / 'evaluation.json'}\nwritten: {folder / 'episodes.jsonl'}")


@console_script("evaluate")
def main(cfg: DictConfig) -> None:
    """Console script: `etpo-evaluate ckpt_path=... [key=value ...]`."""
    try:
        result, played = evaluate(cfg)
    except BaseException:
        remove_made()
        raise
    report(result, played, Path(cfg.paths.output_dir))


if __name__ == "__main__":
    main()
