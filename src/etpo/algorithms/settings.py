"""Typed, frozen settings of the algorithms; `conf/algorithm` mirrors their defaults."""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from etpo.errors import ConfigError, check_integer, check_range


def bounded(
    default: Any, low: float = 0, high: float = float("inf"), *, above: bool = False
) -> Any:
    """Return a numeric dataclass field with a default and a range; `above` excludes `low`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def one_of(default: str, *others: str) -> Any:
    """Return a text dataclass field with its allowed values."""
    return field(default=default, metadata={"allowed": (default, *others)})


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Size of forward passes; it affects memory and time only.

    Args:
        logits_chunk_size: number of prefixes whose logits are in memory at once.

    Raises:
        ConfigError: a value is out of range.
    """

    logits_chunk_size: int = bounded(4096, 1)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            check_value(f"algorithm.{each.name}", getattr(self, each.name), hints[each.name], each)


@dataclass(frozen=True, kw_only=True)
class Settings(BatchSettings):
    """Settings of every on-policy algorithm in addition to `BatchSettings`.

    Args:
        beta: KL coefficient to the reference, >= 0, per nat, in the first iteration.
        beta_final_factor: `beta` is annealed linearly to this multiple of itself.
        beta_anneal_iters: number of iterations of the annealing.
        truncation_kl_coef: coefficient of KL(pi || softmax), where pi is the softmax truncated by
            `min_p`. Lowers the softmax probability of truncated tokens.
        max_kl: limit of the mean KL(pi_old || pi) of an action, in nats; beyond it the policy is
            not updated in the rest of the iteration. None: no limit.
        policy_lr, critic_lr: learning rates of the first iteration.
        max_grad_norm: limit of the gradient norm, of policy and critic separately.
        clip_unit: unit of the algorithm's `clip`, the change in an iteration from which a token
            has no gradient: ratio, of pi/pi_old; probability, of pi (binary total variation, arXiv
            2602.04879).
        max_replay_ratio: limit c of the weight min(c, pi_old/mu) of a replayed action's sampled
            terms; mu is the policy that sampled it.
    """

    beta: float = bounded(0.02)
    beta_final_factor: float = bounded(0.25)
    beta_anneal_iters: int = bounded(60, 1)
    truncation_kl_coef: float = bounded(0.2)
    max_kl: float | None = bounded(0.5, above=True)
    policy_lr: float = bounded(5e-4)
    critic_lr: float = bounded(1e-3)
    max_grad_norm: float = bounded(1.0, above=True)
    clip_unit: str = one_of("ratio", "probability")
    max_replay_ratio: float = bounded(1.0, above=True)


def check_value(key: str, value: Any, hint: Any, setting: Any) -> None:
    """Raise ConfigError unless `value` has the type `hint` and is allowed by the field."""
    types, allowed = get_args(hint) or (hint,), setting.metadata.get("allowed")
    if value is None and type(None) in types:
        return
    if bool in types and not isinstance(value, bool):
        raise ConfigError(f"{key}={value}: allowed are true, false")
    if allowed is not None and value not in allowed:
        raise ConfigError(f"{key}={value}: allowed are {', '.join(allowed)}")
    limits = dict(setting.metadata)
    if int in types:
        high = limits["high"]
        check_integer(key, value, limits["low"], None if high == float("inf") else high)
    elif float in types:
        check_range(key, value, limits["low"], limits["high"], above=limits["above"])


Kind = TypeVar("Kind", bound=BatchSettings)


def build_settings(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """Build settings from config values; raise ConfigError for an unknown key or a bad value."""
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"algorithm: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TraceSettings(Settings):
    """Lambdas of algorithms with a critic, in addition to `Settings`.

    Args:
        lambda_: lambda of the advantages; inside actions only if `lambda_between` is set.
        lambda_between: lambda from an action to the next one; None: `lambda_`.
        lambda_length_alpha: lambda of an action of l steps is 1 - 1 / (alpha l) inside the action
            (VAPO, arXiv 2504.05118); None: `lambda_`.
        critic_lambda: lambda of the critic's targets at both levels; None: as for the advantages.
        critic_warmup_iters: first iterations, in which the critic alone is trained, on the returns
            of the first policy (VC-PPO, arXiv 2503.01491).
    """

    lambda_: float = bounded(0.95, 0, 1)
    lambda_between: float | None = bounded(None, 0, 1)
    lambda_length_alpha: float | None = bounded(None, above=True)
    critic_lambda: float | None = bounded(None, 0, 1)
    critic_warmup_iters: int = bounded(0)

    @property
    def between(self) -> float:
        """Lambda from an action to the next one."""
        return self.lambda_ if self.lambda_between is None else self.lambda_between


@dataclass(frozen=True, kw_only=True)
class PolicyGradientSettings(Settings):
    """Settings of the algorithms that use sampled tokens only.

    Args:
        gamma: discount between actions.
        clip: PPO's clip range, in `clip_unit`. None: no clipping.
    """

    gamma: float = bounded(0.99, 0, 1)
    clip: float | None = bounded(0.2, 0, 1, above=True)
