"""Critics: a dueling head over the vocabulary or a scalar one, and what feeds it."""

import copy
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from etpo.errors import ConfigError
from etpo.models.backbone import Backbone
from etpo.models.shared_prompt import forward_actions

WITH_HEAD = ("full", "lora", "frozen_trunk")


class DuelingHead(nn.Module):
    """Features [..., D] -> (value [...], advantage [..., V]), both float32.

    Q(x, w) = value + advantage(w) - E_pi[advantage]; both outputs start at exactly zero, so that
    a token that was never tried keeps advantage 0 (Wang et al., arXiv 1511.06581).
    """

    def __init__(self, feature_size: int, vocabulary_size: int, hidden_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(feature_size), nn.Linear(feature_size, hidden_size), nn.GELU()
        )
        self.value = nn.Linear(hidden_size, 1)
        self.advantage = nn.Linear(hidden_size, vocabulary_size)
        for layer in (self.value, self.advantage):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(features.float())
        return self.value(hidden).squeeze(-1), self.advantage(hidden)


class ValueHead(nn.Module):
    """Features [..., D] -> value [...], float32, exactly zero at the start.

    Takes the arguments of `DuelingHead`; the vocabulary does not matter to it.
    """

    def __init__(self, feature_size: int, vocabulary_size: int, hidden_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(feature_size), nn.Linear(feature_size, hidden_size), nn.GELU()
        )
        self.value = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.value(self.body(features.float())).squeeze(-1)


class HeadCritic(nn.Module):
    """A head on the frozen reference's last hidden states: no further language model."""

    def __init__(
        self, backbone: Backbone, hidden_size: int = 512, head: type[nn.Module] = DuelingHead
    ) -> None:
        super().__init__()
        self.head = head(backbone.feature_size, backbone.vocabulary_size, hidden_size)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor, features: Tensor
    ) -> Any:
        """[B, P], [B, P], [B, L] and the reference's features [B, L, D] -> what the head gives.

        `DuelingHead`: [B, L] and [B, L, V]; `ValueHead`: [B, L].
        """
        return self.head(features)


class TrunkCritic(nn.Module):
    """A head on a trainable copy of the language model without its output layer."""

    def __init__(
        self, backbone: Backbone, hidden_size: int = 512, head: type[nn.Module] = DuelingHead
    ) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(pretrained(backbone).base_model).requires_grad_(True).float()
        self.head = head(backbone.feature_size, backbone.vocabulary_size, hidden_size)

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
        outputs = forward_actions(run, self.trunk.config, *inputs)
        return outputs if len(outputs) > 1 else outputs[0]


class LoraCritic(TrunkCritic):
    """A head and an adapter on the frozen language model, whose weights are those of the backbone.

    lora: arguments of `peft.LoraConfig`. Raises ConfigError where they do not fit the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        hidden_size: int = 512,
        head: type[nn.Module] = DuelingHead,
        *,
        lora: dict[str, Any],
    ) -> None:
        nn.Module.__init__(self)
        trunk = copy_sharing_frozen(pretrained(backbone).base_model)
        try:
            self.trunk = inject_adapter_in_model(LoraConfig(**lora), trunk)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"critic.lora: {' '.join(str(error).split())[:160]}") from error
        self.head = head(backbone.feature_size, backbone.vocabulary_size, hidden_size)


class LanguageModelCritic(nn.Module):
    """A trainable copy of the whole language model whose logits are Q, as in the paper.

    Raises ConfigError for an algorithm whose critic is another function than Q.
    """

    def __init__(self, backbone: Backbone, head: type[nn.Module] = DuelingHead) -> None:
        super().__init__()
        if head is not DuelingHead:
            raise ConfigError(f"critic=lm_copy: allowed are {', '.join(WITH_HEAD)}")
        self.model = copy.deepcopy(pretrained(backbone)).requires_grad_(True).float()
        self.vocabulary_size = backbone.vocabulary_size

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
        (logits,) = forward_actions(run, self.model.config, *inputs)
        return None, logits[..., : self.vocabulary_size].float()


def pretrained(backbone: Backbone) -> nn.Module:
    """The frozen causal LM of a backbone, with its own weights; no adapter is in it."""
    # with an adapter there is no separate reference: the copied policy sheds its own
    return backbone.reference or copy_sharing_frozen(backbone.policy).unload()


def copy_sharing_frozen(module: nn.Module) -> nn.Module:
    """A copy in which parameters that are not trained are the same objects, held once."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, frozen)


def target_of(critic: nn.Module) -> nn.Module:
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
