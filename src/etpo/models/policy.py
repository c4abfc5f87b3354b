"""A causal language model of the Hugging Face library as policy, with its frozen reference."""

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from etpo.environments.text_env import TextObservation
from etpo.errors import ConfigError, check_integer, check_range
from etpo.models.adapters import add_adapter
from etpo.models.causal_lm import language_model, trunk
from etpo.models.loading import expanded, load_model, load_tokenizer
from etpo.models.probe import check_forwards
from etpo.models.prompting import PromptTemplate
from etpo.models.shared_prompt import checkpoint_layers, forward_actions
from etpo.models.token_text import added_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("eager", "sdpa", "flash_attention_2")


class TokenOutput(NamedTuple):
    """log_probs: float32 [B, L, V] over the vocabulary; features: [B, L, D] last hidden states.

    log_kept: float32 [B, L], log of the softmax's mass on the tokens that have probability.
    """

    log_probs: Tensor
    features: Tensor
    log_kept: Tensor


class PromptBatch(NamedTuple):
    """ids: int64 [B, P], padded on the left; mask: bool [B, P]; dropped: tokens cut in all.

    rests: `Prompt.rest` of every row; () where all are empty.
    """

    ids: Tensor
    mask: Tensor
    dropped: int
    rests: tuple[str, ...] = ()


class LanguageModelPolicy(nn.Module):
    """Policy pi_theta and reference pi_ref over one tokenizer.

    Without `lora` the reference is a frozen copy of the pretrained weights; with it, the policy
    with its adapter switched off. pi is softmax(logits / temperature), for the reference too, and
    the same pi is sampled and trained. Padded vocabulary ids take no probability. Dropout is off
    in every forward. With `min_p` the policy gives no probability to tokens that would have less
    than min_p times that of the likeliest one (arXiv 2407.01082); the reference keeps all tokens.

    name_or_path: hub id or local folder of a causal LM.
    prompt: how observations become tokens.
    stop_tokens: a further token, or several, that end an action, besides the EOS tokens of the
    tokenizer and of the model's generation configuration.
    stop_strings: a string, or several, that end an action; the string itself is not part of the
    action text. A backslash followed by n, r, t or a backslash is the character that it means in
    Python.
    gradient_checkpointing: compute each layer's activations again in the backward pass.
    lora: arguments of `peft.LoraConfig` that leave the reference alone, or None for full
    fine-tuning.
    Raises ConfigError for a path that holds no causal LM and for values out of range.
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
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"model.dtype={dtype}: allowed are {', '.join(DTYPES)}")
        if attn_implementation not in ATTENTION:
            raise ConfigError(
                f"model.attn_implementation={attn_implementation}: allowed are "
                f"{', '.join(ATTENTION)}"
            )
        check_range("model.temperature", temperature, 0, float("inf"), above=True)
        check_range("model.min_p", min_p, 0, 1)
        check_integer("model.max_prompt_tokens", max_prompt_tokens, 1)
        self.prompt = prompt
        self.temperature, self.min_p = temperature, min_p
        self.max_prompt_tokens = max_prompt_tokens
        self.stop_strings = [unescaped(text) for text in texts("model.stop_strings", stop_strings)]
        name_or_path = expanded(name_or_path)
        self.tokenizer = load_tokenizer(name_or_path)
        self.stop_ids = stop_ids(
            self.tokenizer, texts("model.stop_tokens", stop_tokens), model_eos_ids(name_or_path)
        )
        probe = TextObservation(instruction="a", prefix="a", suffix="a")
        prompt.encode(self.tokenizer, probe, max_prompt_tokens)  # raises before weights are loaded
        model = load_model(name_or_path, DTYPES[dtype], attn_implementation)
        model.generation_config = None
        # before any copy is made
        self.checkpointed = gradient_checkpointing and checkpoint_layers(model)
        if gradient_checkpointing and not self.checkpointed:
            raise ConfigError(
                "model.gradient_checkpointing=true: allowed is false, since "
                f"{model.config.model_type} has no layers that can compute activations again"
            )
        self.reference_model = copy.deepcopy(model).requires_grad_(False) if lora is None else None
        self.model = model if lora is None else add_adapter(model, lora)
        largest = max(self.tokenizer.get_vocab().values())
        rows, self.hidden_size = model.get_output_embeddings().weight.shape
        self.vocabulary_size = min(rows, largest + 1)
        self.context_size = context_size(model.config.get_text_config())
        self.embedding_size = model.get_input_embeddings().weight.shape[0]
        self.check_vocabulary(name_or_path)
        # padding is never read, but it is looked up
        pads = (self.tokenizer.pad_token_id, *self.stop_ids)
        self.pad_id = next(i for i in pads if i is not None and i < self.embedding_size)
        self.eval()
        if attn_implementation in ("eager", "sdpa"):  # the others need a GPU, and the weights on it
            check_forwards(self, name_or_path)

    def train(self, mode: bool = True) -> "LanguageModelPolicy":
        """Keeps evaluation mode: dropout is off in every forward."""
        return super().train(False)

    def check_vocabulary(self, name_or_path: str) -> None:
        """Raises ConfigError where the model lacks words of the tokenizer, or every end."""
        rows, key = self.embedding_size, f"model.name_or_path={name_or_path}"
        if self.tokenizer.vocab_size > rows:
            raise ConfigError(
                f"{key}: its tokenizer has {self.tokenizer.vocab_size} tokens; allowed are at most "
                f"{rows}, the rows of its embedding"
            )
        if min(self.stop_ids) >= self.vocabulary_size:
            raise ConfigError(
                f"{key}: its tokens that end an action, {self.stop_ids}, are none of the model's "
                f"{self.vocabulary_size}; model.stop_tokens names others"
            )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def encode(self, observations: Sequence[TextObservation]) -> PromptBatch:
        """Prompts as left-padded tensors on the CPU; equal observations are tokenized once."""
        encoded = {
            texts: self.prompt.encode(
                self.tokenizer, TextObservation(texts), self.max_prompt_tokens
            )
            for texts in {tuple(o.items()) for o in observations}
        }
        largest = max(i for prompt in encoded.values() for i in prompt.ids)
        if largest >= self.embedding_size:  # a token that was added without a row
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ConfigError(
                f"model.name_or_path={self.tokenizer.name_or_path}: a prompt has the token "
                f"{token!r} ({largest}); allowed are the {self.embedding_size} of its embedding"
            )
        prompts = [encoded[tuple(o.items())] for o in observations]
        width = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = True
        rests = tuple(p.rest for p in prompts)
        return PromptBatch(ids, mask, sum(p.dropped for p in prompts), rests if any(rests) else ())

    def decode(self, ids: Sequence[int], rest: str = "") -> str:
        """The text that an action [l] adds to its prompt, without its stop token or stop string.

        rest: `Prompt.rest`; where the action begins with it, it is not part of the action's text.
        Special tokens other than the stop token are.
        """
        kept = [int(i) for i in ids]
        if kept and kept[-1] in self.stop_ids:
            kept.pop()
        text = added_text(self.tokenizer, kept).removeprefix(rest)
        ends = [text.find(stop) for stop in self.stop_strings]
        return text[: min((end for end in ends if end >= 0), default=len(text))]

    def completes_stop_string(self, ids: Sequence[int], rest: str = "") -> bool:
        """Whether the last of an action's tokens [l] completes a stop string after `rest`."""
        longest = max(len(stop.encode()) for stop in self.stop_strings)
        # a token without a text of its own is a part of a character: a string of n bytes has at
        # most n tokens
        if len(ids) > longest + len(rest):
            ids, rest = ids[-longest:], ""
        text = added_text(self.tokenizer, ids)
        if rest.startswith(text):
            return False
        return any(stop in text.removeprefix(rest) for stop in self.stop_strings)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        *,
        reference: bool = False,
        support: Tensor | None = None,
        known_features: Tensor | None = None,
    ) -> TokenOutput:
        """Distributions of the tokens of action_ids [B, L], each given the prompt and those before.

        Prompts [B, P] are padded on the left, actions on the right. No gradient reaches the
        reference. Equal prompts are computed once, unless activations are checkpointed. `support`
        (bool [B, L, V]): the tokens that may have probability, in place of what `min_p` leaves now.
        The token that was taken always may. `known_features` ([B, L, D]): what the policy's last
        hidden states are, so that its layers need not run.
        """
        if known_features is not None and self.linear_output:
            log_probs, log_kept = self.head(
                known_features, action_ids, reference=reference, support=support
            )
            return TokenOutput(log_probs, known_features, log_kept)
        inputs = prompt_ids, prompt_mask, action_ids
        logits, features = self.run(language_model, *inputs, reference=reference)
        log_probs, log_kept = self.distribution(logits, action_ids, reference, support)
        return TokenOutput(log_probs, features, log_kept)

    def features(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        *,
        reference: bool = False,
    ) -> Tensor:
        """The last hidden states [B, L, D] of `forward`, without what the output layer makes."""
        inputs = prompt_ids, prompt_mask, action_ids
        (features,) = self.run(trunk, *inputs, reference=reference)
        return features

    def head(
        self,
        features: Tensor,
        action_ids: Tensor,
        *,
        reference: bool = False,
        support: Tensor | None = None,
        layer: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`log_probs` [..., V] and `log_kept` [...] of `forward`, of features [..., D].

        action_ids: int64 [...], the tokens that were taken. `layer`: an output layer in place of
        the policy's own. No gradient reaches the reference.
        """
        with self.side(reference) as model:
            logits = (model.get_output_embeddings() if layer is None else layer)(features)
        return self.distribution(logits, action_ids, reference, support)

    @property
    def output_layer(self) -> nn.Module:
        """What makes the policy's logits of its features."""
        layer: nn.Module = self.model.get_output_embeddings()
        return layer

    def head_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of `output_layer`."""
        return [p for p in self.output_layer.parameters() if p.requires_grad]

    @functools.cached_property
    @torch.no_grad()
    def linear_output(self) -> bool:
        """Whether logits are the output layer's of the features, neither scaled nor capped."""
        ids = torch.arange(min(8, self.vocabulary_size), device=self.device)[None]
        inputs = ids, torch.ones_like(ids, dtype=torch.bool), ids
        logits, _ = self.run(language_model, *inputs)
        own = self.output_layer(self.features(*inputs))
        near = max(1e-3, 4 * torch.finfo(logits.dtype).eps)  # scales and caps change far more
        return own.shape == logits.shape and torch.allclose(
            own, logits, rtol=near, atol=near * float(logits.abs().max())
        )

    def check_output_layer(self, key: str) -> None:
        """ConfigError, naming `key`, unless `linear_output`."""
        if not self.linear_output:
            kind = self.model.config.model_type
            raise ConfigError(f"{key}: allowed is null, since {kind} scales or caps its logits")

    @contextlib.contextmanager
    def side(self, reference: bool) -> Iterator[nn.Module]:
        """The policy, or the reference without gradient."""
        with contextlib.ExitStack() as stack:
            if reference:
                stack.enter_context(torch.no_grad())
            if reference and self.reference_model is None:
                stack.enter_context(self.model.disable_adapter())
            yield (
                self.reference_model
                if reference and self.reference_model is not None
                else self.model
            )

    def run(
        self,
        what: Callable[..., tuple[Tensor, ...]],
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        *,
        reference: bool = False,
    ) -> tuple[Tensor, ...]:
        """What `what`, `language_model` or `trunk`, says at the L prefixes of action_ids [B, L]."""
        inputs = prompt_ids, prompt_mask, action_ids
        with self.side(reference) as model:
            run = functools.partial(what, model)
            return forward_actions(run, self.model.config, *inputs, self.checkpointed)

    def distribution(
        self,
        logits: Tensor,
        action_ids: Tensor | None = None,
        reference: bool = False,
        support: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`log_probs` [..., V] and `log_kept` [...] of raw logits [..., >= V]; as `forward`.

        action_ids: [...], None where no token is taken yet.
        """
        log_probs = self.normalise(logits)
        if reference or self.min_p == 0:
            return log_probs, torch.zeros_like(log_probs[..., 0])
        if support is None:
            support = self.supported(log_probs)
            if action_ids is not None:  # the sampler's rounding may have been another
                support = support.scatter(-1, action_ids.unsqueeze(-1), True)
        kept = log_probs.masked_fill(~support, float("-inf"))
        return kept.log_softmax(-1), kept.logsumexp(-1)

    def normalise(self, logits: Tensor) -> Tensor:
        """float32 log-probabilities [..., V] of raw logits [..., >= V], over all tokens."""
        logits = logits[..., : self.vocabulary_size]
        if self.temperature != 1:
            logits = logits.float() / self.temperature
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32)

    def supported(self, log_probs: Tensor) -> Tensor:
        """The tokens that a positive `min_p` leaves: [..., V] -> bool [..., V]."""
        return log_probs >= log_probs.amax(-1, keepdim=True) + math.log(self.min_p)


def context_size(config: PreTrainedConfig) -> int | float:
    """Tokens of prompt and action that a model can read at most; infinity where it has no limit."""
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((size for size in sizes if size), float("inf"))


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str], eos_ids: Sequence[int]
) -> list[int]:
    """Token ids that end an action: the tokenizer's EOS, `eos_ids` and `stop_tokens`.

    Raises ConfigError for an unknown token.
    """
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in stop_tokens if token not in vocabulary]
    if unknown:
        raise ConfigError(f"model.stop_tokens: the tokenizer has no token {unknown[0]!r}")
    known = set(vocabulary.values())
    ids = [vocabulary[token] for token in stop_tokens] + [i for i in eos_ids if i in known]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ConfigError("model.stop_tokens: needed, since the tokenizer has no EOS token")
    return sorted(set(ids))


def model_eos_ids(name_or_path: str) -> list[int]:
    """The EOS ids of generation_config.json or, where it names none, of config.json."""
    try:
        eos = GenerationConfig.from_pretrained(name_or_path).eos_token_id
    except OSError:  # most likely there is no such file
        eos = None
    if eos is None:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path)
        eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def texts(key: str, values: str | Sequence[str] | None) -> list[str]:
    """None, a text or several as a list; ConfigError, naming `key`, for any other value."""
    if values is None:
        return []
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, Sequence) or not all(isinstance(v, str) and v for v in values):
        raise ConfigError(f"{key}={values}: allowed are texts that are not empty, such as [END]")
    return list(values)


def unescaped(text: str) -> str:
    r"""`text` with \n, \r, \t and \\ replaced; a shell hands these over as two characters."""
    meant = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: meant[match[1]], text)
