"""Critics: a dueling head over the vocabulary or a scalar one, and what feeds it."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from etpo.errors import ConfigError, reason
from etpo.models.adapters import inject_adapter, without_adapter
from etpo.models.causal_lm import trunk_of
from etpo.models.policy import LanguageModelPolicy
from etpo.models.shared_prompt import forward_actions

Copied = TypeVar("Copied", bound=nn.Module)
WITH_HEAD = ("full", "lora", "frozen_trunk")


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer with weights and bias of exactly zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ValueHead(nn.Module):
    """Features [..., D] -> value [...], exactly zero at the start.

    float32 in mixed precision too: in bfloat16 values near 1 come in steps of 0.004. The size of
    the vocabulary does not matter to it.
    """

    def __init__(self, input_size: int, vocabulary_size: int, hidden_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(input_size), nn.Linear(input_size, hidden_size), nn.GELU()
        )
        self.value = zeroed(nn.Linear(hidden_size, 1))

    def forward(self, features: Tensor) -> Any:
        with torch.autocast(features.device.type, enabled=False):
            return self.of_hidden(self.body(features.float()))

    def of_hidden(self, hidden: Tensor) -> Any:
        """Of the body's outputs [..., hidden_size], what `forward` says."""
        return self.value(hidden).squeeze(-1)


class DuelingHead(ValueHead):
    """Features [..., D] -> (value [...], advantage [..., V]), both float32.

    Q(x, w) = value + advantage(w) - E_pi[advantage]; both outputs start at exactly zero, so that
    a token that was never tried keeps advantage 0 (Wang et al., arXiv 1511.06581).
    """

    def __init__(self, input_size: int, vocabulary_size: int, hidden_size: int) -> None:
        super().__init__(input_size, vocabulary_size, hidden_size)
        self.advantage = zeroed(nn.Linear(hidden_size, vocabulary_size))

    def of_hidden(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return super().of_hidden(hidden), self.advantage(hidden)


class Critic(nn.Module):
    """What says something of every prefix: `head` of `features`."""

    head: Callable[[Tensor], Any]  # features [..., D] -> what `forward` says

    def features(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor, features: Tensor
    ) -> Tensor:
        """The states [B, L, D] of its own; arguments as in `forward`."""
        raise NotImplementedError

    def head_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of `head`."""
        return [p for p in self.head.parameters() if p.requires_grad]


class HeadCritic(Critic):
    """A head on the frozen reference's last hidden states: no further language model."""

    def __init__(
        self,
        policy: LanguageModelPolicy,
        hidden_size: int = 512,
        head: type[nn.Module] = DuelingHead,
    ) -> None:
        super().__init__()
        self.head = head(policy.hidden_size, policy.vocabulary_size, hidden_size)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor, features: Tensor
    ) -> Any:
        """[B, P], [B, P], [B, L] and the reference's features [B, L, D] -> what the head gives.

        `DuelingHead`: [B, L] and [B, L, V]; `ValueHead`: [B, L].
        """
        return self.head(features)

    def features(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor, features: Tensor
    ) -> Tensor:
        return features


class TrunkCritic(Critic):
    """A head on a trainable copy of the language model without its output layer."""

    def __init__(
        self,
        policy: LanguageModelPolicy,
        hidden_size: int = 512,
        head: type[nn.Module] = DuelingHead,
    ) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(trunk_of(pretrained(policy))).requires_grad_(True).float()
        self.checkpointed = policy.checkpointed
        self.head = head(policy.hidden_size, policy.vocabulary_size, hidden_size)

    def train(self, mode: bool = True) -> "TrunkCritic":
        """Keeps evaluation mode: dropout is off in every forward."""
        return super().train(False)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor, features: Tensor
    ) -> Any:
        """[B, P], [B, P], [B, L] and features, which are not read -> as `HeadCritic`."""

        def run(last: int, **inputs: Tensor) -> tuple[Tensor, ...]:
            output = self.head(self.trunk(**inputs).last_hidden_state[:, -last:])
            return output if isinstance(output, tuple) else (output,)

        inputs = prompt_ids, prompt_mask, action_ids
        outputs = forward_actions(run, self.trunk.config, *inputs, self.checkpointed)
        return outputs if len(outputs) > 1 else outputs[0]

    def features(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor, features: Tensor
    ) -> Tensor:
        inputs = prompt_ids, prompt_mask, action_ids
        return last_states(self.trunk, *inputs, self.checkpointed)


class LoraCritic(TrunkCritic):
    """A head and an adapter on the frozen language model, whose weights are those of the policy.

    lora: arguments of `peft.LoraConfig`. Raises ConfigError where they do not fit the model.
    """

    def __init__(
        self,
        policy: LanguageModelPolicy,
        hidden_size: int = 512,
        head: type[nn.Module] = DuelingHead,
        *,
        lora: dict[str, Any],
    ) -> None:
        nn.Module.__init__(self)
        trunk = copy_sharing_frozen(trunk_of(pretrained(policy)))
        self.trunk = inject_adapter(trunk, lora)
        try:  # a layer that only looks linear, such as a router, fails here
            with torch.no_grad():
                self.trunk(input_ids=torch.zeros(1, 1, dtype=torch.long, device=policy.device))
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"critic.lora: {reason(error)}") from error
        for parameter in self.trunk.parameters():
            if parameter.requires_grad:  # peft gives it the type of the weights that it lies on
                parameter.data = parameter.data.float()
        self.checkpointed = policy.checkpointed
        self.head = head(policy.hidden_size, policy.vocabulary_size, hidden_size)


class LanguageModelCritic(Critic):
    """A trainable copy of the whole language model whose logits are Q, as in the paper.

    Raises ConfigError for an algorithm whose critic is another function than Q.
    """

    def __init__(self, policy: LanguageModelPolicy, head: type[nn.Module] = DuelingHead) -> None:
        super().__init__()
        if head is not DuelingHead:
            raise ConfigError(f"critic=lm_copy: allowed are {', '.join(WITH_HEAD)}")
        self.model = copy.deepcopy(pretrained(policy)).requires_grad_(True).float()
        self.checkpointed = policy.checkpointed
        self.vocabulary_size = policy.vocabulary_size

    def train(self, mode: bool = True) -> "LanguageModelCritic":
        """Keeps evaluation mode: dropout is off in every forward."""
        return super().train(False)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor, features: Tensor
    ) -> tuple[None, Tensor]:
        """As `HeadCritic`, but no value, and Q [B, L, V] in place of the advantage."""

        def run(last: int, **inputs: Tensor) -> tuple[Tensor]:
            return (self.model(**inputs, logits_to_keep=last).logits,)

        inputs = prompt_ids, prompt_mask, action_ids
        (logits,) = forward_actions(run, self.model.config, *inputs, self.checkpointed)
        return None, logits[..., : self.vocabulary_size].float()

    def features(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor, features: Tensor
    ) -> Tensor:
        inputs = prompt_ids, prompt_mask, action_ids
        return last_states(trunk_of(self.model), *inputs, self.checkpointed)

    def head(self, features: Tensor) -> tuple[None, Tensor]:
        """Features [..., D] -> no value, and Q [..., V]."""
        logits = self.model.get_output_embeddings()(features)
        return None, logits[..., : self.vocabulary_size].float()

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.model.get_output_embeddings().parameters())


def last_states(
    trunk: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    action_ids: Tensor,
    checkpointed: bool,
) -> Tensor:
    """The last hidden states of a language model at the L prefixes of action_ids [B, L]."""

    def run(last: int, **inputs: Tensor) -> tuple[Tensor]:
        return (trunk(**inputs).last_hidden_state[:, -last:],)

    inputs = prompt_ids, prompt_mask, action_ids
    (states,) = forward_actions(run, trunk.config, *inputs, checkpointed)
    return states


def pretrained(policy: LanguageModelPolicy) -> nn.Module:
    """The frozen causal LM of a policy, with its own weights; no adapter is in it."""
    # with an adapter there is no separate reference: the copied policy sheds its own
    return policy.reference_model or without_adapter(copy_sharing_frozen(policy.model))


def copy_sharing_frozen(module: Copied) -> Copied:
    """A copy in which parameters that are not trained are the same objects, held once."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, frozen)


def target_of(critic: Copied) -> Copied:
    """A frozen copy that `polyak_update` moves; what the critic does not train is shared."""
    target = copy_sharing_frozen(critic)
    return target.requires_grad_(False)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, parameter by parameter; 0 <= tau <= 1.

    Parameters that both share stay as they are.
    """
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        if old is not new:
            old.lerp_(new, tau)
