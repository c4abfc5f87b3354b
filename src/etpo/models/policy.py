"""A causal language model of the Hugging Face library as policy, with its frozen reference."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from etpo.environments.text_env import TextObservation
from etpo.errors import ConfigError, check_integer, check_range
from etpo.models.adapters import add_adapter
from etpo.models.base_weights import BASE_SAMPLE, weight_sample
from etpo.models.causal_lm import trunk_of
from etpo.models.chunked_logits import project_to_vocabulary
from etpo.models.distribution import (
    TokenDistribution,
    scale_logits,
    supported_distribution,
    token_distribution,
)
from etpo.models.loading import expanded, load_model, load_tokenizer
from etpo.models.prefix_tree import PrefixTree
from etpo.models.probe import check_forwards
from etpo.models.prompting import Prompt, PromptBatch, PromptTemplate, Turn
from etpo.models.quantization import check_quantization
from etpo.models.stopping import end_token, parse_stop_strings, stop_ids
from etpo.models.token_columns import ALL_TOKENS, TokenColumns, pack
from etpo.models.token_text import added_text
from etpo.models.tree_forward import checkpoint_layers, forward_tree


class LanguageModelPolicy(nn.Module):
    """Policy pi_theta and reference pi_ref over one tokenizer.

    Without `lora` the reference is a frozen copy of the pretrained weights; with it, the policy
    with its adapter disabled. pi is softmax(logits / temperature), for the reference too, and the
    same pi is sampled and trained. Padded vocabulary ids have no probability. Dropout is off in
    every forward.

    Args:
        name_or_path: Hub id or local folder of a causal LM.
        prompt: Encodes observations as tokens.
        temperature: Divides the logits.
        min_p: The policy gives no probability to tokens below this share of the likeliest token's
            (arXiv 2407.01082); the reference keeps all tokens.
        max_prompt_tokens: Longer prompts lose their oldest tokens.
        stop_tokens: One or several tokens that end an action, in addition to the EOS tokens of
            tokenizer and model.
        stop_strings: One or several strings that end an action and are not part of its text; an
            escaped n, r, t or backslash has its meaning in Python.
        gradient_checkpointing: Recompute each layer's activations in the backward pass.
        lora: Arguments of `peft.LoraConfig`; None trains all weights.
        quantization: "nf4" holds the base weights under `lora` in 4 bits (arXiv 2305.14314).

    Raises:
        ConfigError: the path has no causal LM, or a value is out of range.
    """

    model: PreTrainedModel  # with `lora` a `PeftModel` of one

    def __init__(
        self,
        name_or_path: str,
        prompt: PromptTemplate,
        *,
        dtype: str = "float32",
        attn_implementation: str = "sdpa",
        temperature: float = 1.0,
        min_p: float = 0.0,
        max_prompt_tokens: int = 1024,
        stop_tokens: str | Sequence[str] | None = (),
        stop_strings: str | Sequence[str] | None = (),
        gradient_checkpointing: bool = False,
        lora: dict[str, Any] | None = None,
        quantization: str | None = None,
    ) -> None:
        super().__init__()
        check_range("model.temperature", temperature, 0, float("inf"), above=True)
        check_range("model.min_p", min_p, 0, 1)
        check_integer("model.max_prompt_tokens", max_prompt_tokens, 1)
        self.prompt, self.max_prompt_tokens = prompt, max_prompt_tokens
        self.temperature, self.min_p = temperature, min_p
        name_or_path = expanded(name_or_path)
        check_quantization(quantization, name_or_path, lora)
        self.key = f"model.name_or_path={name_or_path}"
        self.stop_strings = parse_stop_strings(stop_strings)
        self.tokenizer = load_tokenizer(name_or_path)
        self.stop_ids = stop_ids(self.tokenizer, stop_tokens, name_or_path)
        # before weights are loaded: raises ConfigError if the tokenizer does not fit
        example = TextObservation(instruction="a", prefix="a", suffix="a")
        prompt.encode(self.tokenizer, example, max_prompt_tokens)
        model = load_model(name_or_path, dtype, attn_implementation, quantization)
        # before any copy is made
        self.checkpointed = gradient_checkpointing and checkpoint_layers(model)
        if gradient_checkpointing and not self.checkpointed:
            raise ConfigError(
                "model.gradient_checkpointing=true: allowed is false, since "
                f"{model.config.model_type} has no layers that can compute activations again"
            )
        self.register_buffer(BASE_SAMPLE, weight_sample(model))
        self.reference_model = copy.deepcopy(model).requires_grad_(False) if lora is None else None
        self.model = model if lora is None else add_adapter(model, lora)
        self._set_sizes(model)
        self.end_token = end_token(self.tokenizer, self.stop_ids, self.stop_strings)
        self.eval()
        # whether `SharedPrefixCache` decodes the model, and `forward_tree` packs its tokens
        self.shares_prefixes = self.packs_prefixes = False
        if attn_implementation in ("eager", "sdpa"):  # the others need a GPU, and the weights on it
            self.shares_prefixes, self.packs_prefixes = check_forwards(self, name_or_path)

    def _set_sizes(self, model: PreTrainedModel) -> None:
        """Set sizes and pad token; raise ConfigError if the tokenizer does not fit the model."""
        key, tokenizer = self.key, self.tokenizer
        rows, self.hidden_size = model.get_output_embeddings().weight.shape
        self.vocabulary_size = min(rows, max(tokenizer.get_vocab().values()) + 1)
        self.embedding_size = model.get_input_embeddings().weight.shape[0]
        if tokenizer.vocab_size > self.embedding_size:
            raise ConfigError(
                f"{key}: its tokenizer has {tokenizer.vocab_size} tokens; allowed are at most "
                f"{self.embedding_size}, the rows of its embedding"
            )
        if min(self.stop_ids) >= self.vocabulary_size:
            raise ConfigError(
                f"{key}: its tokens that end an action, {self.stop_ids}, are not among the "
                f"model's {self.vocabulary_size}; model.stop_tokens adds others"
            )
        config = model.config.get_text_config()
        limits = (getattr(config, n, None) for n in ("max_position_embeddings", "max_seq_len"))
        # the most tokens that the model can read
        self.context_size = next((limit for limit in limits if limit), float("inf"))
        # padding is never read, but it is looked up
        pads = (tokenizer.pad_token_id, *self.stop_ids)
        self.pad_id = next(i for i in pads if i is not None and i < self.embedding_size)

    def train(self, mode: bool = True) -> "LanguageModelPolicy":
        """Keep evaluation mode: dropout is off in every forward."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def encode(
        self,
        observations: Sequence[TextObservation],
        turns: Sequence[Turn | None] | None = None,
    ) -> PromptBatch:
        """Encode prompts as left-padded tensors on the CPU; equal ones are tokenized once.

        Args:
            observations: One per row.
            turns: The last turn of each row's episode. The prompt keeps its tokens if the
                observation continues it. None, also of a row: tokenize the observation.

        Raises:
            ConfigError: a prompt has a token without a row in the embedding.
        """
        rows = list(zip(observations, turns or [None] * len(observations), strict=True))
        keys = list(map(repr, rows))
        distinct = dict(zip(keys, rows, strict=True))
        encoded = {key: self._prompt(*row) for key, row in distinct.items()}
        largest = max(i for prompt in encoded.values() for i in prompt.ids)
        if largest >= self.embedding_size:  # a token that was added without a row
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ConfigError(
                f"{self.key}: a prompt has the token {token!r} ({largest}); allowed are the "
                f"{self.embedding_size} of its embedding"
            )
        prompts = [encoded[key] for key in keys]
        choices = tuple(observation.get("choices") for observation in observations)
        tensors = [torch.tensor(prompt.ids) for prompt in prompts]
        ids = pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side="left")
        mask, rests = ids >= 0, tuple(prompt.rest for prompt in prompts)
        dropped = sum(prompt.dropped for prompt in prompts)
        return PromptBatch(ids.where(mask, self.pad_id), mask, dropped, rests, choices)

    def _prompt(self, observation: TextObservation, turn: Turn | None) -> Prompt:
        """Extend the last turn's prompt, or encode the observation alone."""
        inputs, limit = (self.tokenizer, observation), self.max_prompt_tokens
        extended = None
        if turn is not None:
            extended = self.prompt.extend(*inputs, turn, self.stop_ids, limit)
        return self.prompt.encode(*inputs, limit) if extended is None else extended

    def decode(self, ids: Sequence[int], rest: str = "") -> str:
        """Return the text that an action [l] adds to its prompt, up to its stop token or string.

        rest: `Prompt.rest`, removed from the text's start. Other special tokens are kept.
        """
        kept = [int(i) for i in ids]
        if kept and kept[-1] in self.stop_ids:
            kept.pop()
        text = added_text(self.tokenizer, kept).removeprefix(rest)
        ends = [text.find(stop) for stop in self.stop_strings]
        return text[: min((end for end in ends if end >= 0), default=len(text))]

    def hidden_states(self, tree: PrefixTree, reference: bool = False) -> Tensor:
        """Compute the last hidden states [N, D] of the prefixes of `tree`.

        Each distinct token is computed once if `packs_prefixes`. No gradient reaches the reference.
        """
        with self._weights(reference) as model:
            return forward_tree(trunk_of(model), tree, self.packs_prefixes)

    def logits(
        self,
        hidden: Tensor,
        ids: Tensor | None = None,
        *,
        reference: bool = False,
        lm_head: nn.Module | None = None,
    ) -> Tensor:
        """Compute the model's logits [..., U] of the tokens `ids` [U], or of all, [..., V].

        hidden: last hidden states [..., D].
        """
        with self._weights(reference) as model:
            head = model.get_output_embeddings() if lm_head is None else lm_head
            logits = project_to_vocabulary(head, hidden, ids)
        if ids is None:
            logits = logits[..., : self.vocabulary_size]
        return scale_logits(logits, self.model.config.get_text_config())

    def log_probs(
        self,
        hidden: Tensor,
        columns: TokenColumns = ALL_TOKENS,
        *,
        taken: Tensor | None = None,
        reference: bool = False,
        lm_head: nn.Module | None = None,
    ) -> TokenDistribution:
        """Compute the distribution over the columns' tokens at last hidden states [..., D].

        Args:
            hidden: Any selection of the result of `hidden_states`.
            columns: Tokens that are computed, allowed and supported. Without a support, `min_p`
                selects it.
            taken: int64 [..., C], columns that `min_p` always keeps.
            reference: Use the reference's LM head, without gradient; it keeps all allowed tokens.
            lm_head: Use this LM head instead of the policy's current one.
        """
        logits = self.logits(hidden, columns.ids, reference=reference, lm_head=lm_head)
        return token_distribution(
            logits,
            self.temperature,
            0.0 if reference else self.min_p,
            allowed=columns.allowed,
            support=columns.support,
            taken=taken,
        )

    def supported(self, hidden: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Compute the distribution over the tokens with a probability at hidden states [n, D].

        allowed: int32 [n, W], the action space; W = 0 for the whole vocabulary.

        Returns:
            log_probs: [n, U].
            ids: int64 [U], its tokens; None for all.
            support: int32 [n, W], the tokens with a probability; `allowed` without `min_p`.
        """
        columns = TokenColumns.of(self.vocabulary_size, allowed)
        if self.min_p == 0:
            return self.log_probs(hidden, columns).log_probs, columns.ids, allowed
        logits = self.logits(hidden, columns.ids)
        options = self.temperature, self.min_p, columns.allowed
        log_probs, ids = supported_distribution(logits, *options)
        if columns.ids is not None:
            ids = columns.ids[ids]
        return log_probs, ids, pack(log_probs.isfinite(), ids, self.vocabulary_size)

    @property
    def lm_head(self) -> nn.Module:
        """The policy's LM head."""
        return self.model.get_output_embeddings()

    def lm_head_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the LM head."""
        return [p for p in self.lm_head.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def _weights(self, reference: bool) -> Iterator[nn.Module]:
        """Yield the policy's model, or the reference's without gradient."""
        if not reference:
            yield self.model
        elif self.reference_model is not None:
            with torch.no_grad():
                yield self.reference_model
        else:
            with torch.no_grad(), self.model.disable_adapter():
                yield self.model
