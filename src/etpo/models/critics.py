"""Critics: a head on a choice of hidden states."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from etpo.errors import ConfigError, reason
from etpo.models.adapters import inject_adapter, without_adapter
from etpo.models.causal_lm import trunk_of
from etpo.models.chunked_logits import project_to_vocabulary
from etpo.models.critic_heads import DuelingHead, FoldHeads
from etpo.models.distribution import scale_logits
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prefix_tree import PrefixTree
from etpo.models.quantization import has_float_weights
from etpo.models.tree_forward import forward_tree

Copied = TypeVar("Copied", bound=nn.Module)
Head = type[nn.Module]
WITH_HEAD = ("full", "lora", "frozen_trunk", "policy_trunk")


class Critic(nn.Module):
    """A head on hidden states at every prefix of an action.

    Args:
        policy: The policy whose model the critic uses or copies.
        hidden_size: Units of the head.
        head: Type of the head.
        tie_embeddings: Score tokens against the frozen LM head instead of weights of the head.
        cross_fit: Train two heads, each on one half of the environments, and evaluate an action
            with the head that was not trained on it (cross-fitting; Chernozhukov et al., 2018).

    Raises:
        ConfigError: `cross_fit` with a trunk, which both halves would train.
    """

    trunk: nn.Module | None  # computes the hidden states; None: the frozen reference does
    # hidden states [..., C], and tokens [U] or None for all -> the outputs of `forward`
    head: Callable[..., Any]

    def __init__(
        self,
        policy: LanguageModelPolicy,
        hidden_size: int = 512,
        head: Head = DuelingHead,
        tie_embeddings: bool = False,
        cross_fit: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = self.make_trunk(policy)
        if cross_fit and self.trunk is not None:
            raise ConfigError(
                "critic.cross_fit=true: allowed are critic=frozen_trunk, policy_trunk, which "
                "train heads only"
            )
        self.packs_prefixes, self.cross_fit = policy.packs_prefixes, cross_fit
        embeddings = base_model_of(policy).get_output_embeddings() if tie_embeddings else None
        sizes = policy.hidden_size, policy.vocabulary_size, hidden_size
        heads = [head(*sizes, embeddings) for _ in range(2 if cross_fit else 1)]
        self.head = FoldHeads(heads) if cross_fit else heads[0]

    def make_trunk(self, policy: LanguageModelPolicy) -> nn.Module | None:
        """Return the language model, without LM head, that the critic trains, if any."""
        return None

    def hidden_states(self, tree: PrefixTree, ref_hidden: Tensor, old_hidden: Tensor) -> Tensor:
        """Compute the critic's hidden states [N, C] of the prefixes of `tree`.

        ref_hidden, old_hidden: hidden states [N, D] of the same prefixes, of the reference and of
            the policy at the start of the iteration.
        """
        if self.trunk is None:
            return ref_hidden
        return forward_tree(self.trunk, tree, self.packs_prefixes)

    def outputs(self, hidden: Tensor, ids: Tensor | None, fold: Tensor) -> Any:
        """Return the outputs of `head`, of a cross-fitted critic those of the head `fold` [N].

        hidden: [N, C]. ids: tokens [U], or None for all.
        """
        return self.head(hidden, ids, fold) if self.cross_fit else self.head(hidden, ids)

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of `head`."""
        return [p for p in self.head.parameters() if p.requires_grad]

    def forward(self, tree: PrefixTree, ref_hidden: Tensor, old_hidden: Tensor) -> Any:
        """Return the outputs of `head` at the hidden states; arguments as of `hidden_states`."""
        return self.head(self.hidden_states(tree, ref_hidden, old_hidden))

    def train(self, mode: bool = True) -> "Critic":
        """Keep evaluation mode: dropout is off in every forward."""
        return super().train(False)


class HeadCritic(Critic):
    """A head on the frozen reference's last hidden states: no further language model."""


class PolicyHeadCritic(Critic):
    """A head on the policy's last hidden states, without a gradient to the policy.

    The iteration computes them for the policy's old log-probabilities anyway, so the critic needs
    no forward of a language model.
    """

    def hidden_states(self, tree: PrefixTree, ref_hidden: Tensor, old_hidden: Tensor) -> Tensor:
        return old_hidden.detach()


class TrunkCritic(Critic):
    """A head on a trainable copy of the language model without its LM head."""

    def make_trunk(self, policy: LanguageModelPolicy) -> nn.Module:
        return trainable_copy(trunk_of(base_model_of(policy)), "full")


class LoraCritic(Critic):
    """A head and an adapter on the policy's frozen language model, whose weights are shared.

    lora: arguments of `peft.LoraConfig`. Raises ConfigError if they do not fit the model.
    """

    def __init__(
        self,
        policy: LanguageModelPolicy,
        hidden_size: int = 512,
        head: Head = DuelingHead,
        tie_embeddings: bool = False,
        *,
        lora: dict[str, Any],
    ) -> None:
        self.lora = lora
        super().__init__(policy, hidden_size, head, tie_embeddings)

    def make_trunk(self, policy: LanguageModelPolicy) -> nn.Module:
        trunk = inject_adapter(copy_sharing_frozen(trunk_of(base_model_of(policy))), self.lora)
        try:  # a layer that only looks linear, such as a router, fails here
            with torch.no_grad():
                trunk(input_ids=torch.zeros(1, 1, dtype=torch.long, device=policy.device))
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"critic.lora: {reason(error)}") from error
        for parameter in trunk.parameters():
            if parameter.requires_grad:  # peft gives an adapter the dtype of its base weights
                parameter.data = parameter.data.float()
        return trunk


class LanguageModelCritic(Critic):
    """A trainable copy of the whole language model whose logits are Q, as in the paper.

    `forward` returns no value, and Q [N, V] instead of the advantage. Raises ConfigError if the
    algorithm's critic is not a Q-function.
    """

    def __init__(self, policy: LanguageModelPolicy, head: Head = DuelingHead) -> None:
        nn.Module.__init__(self)
        if head is not DuelingHead:
            raise ConfigError(f"critic=lm_copy: allowed are {', '.join(WITH_HEAD)}")
        self.model = trainable_copy(base_model_of(policy), "lm_copy")
        self.packs_prefixes, self.cross_fit = policy.packs_prefixes, False
        self.vocabulary_size = policy.vocabulary_size

    @property
    def trunk(self) -> nn.Module:  # type: ignore[override]
        return trunk_of(self.model)

    def head(  # type: ignore[override]
        self, hidden: Tensor, ids: Tensor | None = None
    ) -> tuple[None, Tensor]:
        """Return no value, and Q [..., V], or of `ids` [U], of hidden states [..., D]."""
        logits = project_to_vocabulary(self.model.get_output_embeddings(), hidden, ids)
        if ids is None:
            logits = logits[..., : self.vocabulary_size]
        return None, scale_logits(logits, self.model.config.get_text_config()).float()

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.model.get_output_embeddings().parameters())


def base_model_of(policy: LanguageModelPolicy) -> nn.Module:
    """Return the policy's frozen pretrained causal LM, without an adapter."""
    # with an adapter there is no separate reference: a copy of the policy is taken out of it
    return policy.reference_model or without_adapter(copy_sharing_frozen(policy.model))


def trainable_copy(module: Copied, critic: str) -> Copied:
    """Return a float32 copy that is trained; raise ConfigError if its weights are quantised."""
    if not has_float_weights(module):
        raise ConfigError(
            f"critic={critic}: it trains a copy of the language model; allowed with "
            "model.quantization are lora, frozen_trunk, policy_trunk"
        )
    return copy.deepcopy(module).requires_grad_(True).float()


def copy_sharing_frozen(module: Copied) -> Copied:
    """Return a copy that shares the parameters that are not trained."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, frozen)


def snapshot(module: Copied) -> Copied:
    """Return `copy_sharing_frozen` without hooks; a profiler's or logger's may not be copyable."""
    attributes = [each for part in module.modules() for each in vars(part).items()]
    memo = {id(each): type(each)() for name, each in attributes if name.endswith("_hooks")}
    memo |= {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, memo)


def make_target_network(critic: Copied) -> Copied:
    """Return a frozen copy for `polyak_update`; it shares what the critic does not train."""
    return copy_sharing_frozen(critic).requires_grad_(False)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Set target <- (1 - tau) target + tau source for all parameters that are not shared."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        if old is not new:
            old.lerp_(new, tau)
