"""A causal language model of the Hugging Face library as policy, with its frozen reference."""

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
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
from etpo.models.causal_lm import last_hidden_states, trunk_of
from etpo.models.chunked_logits import project_to_vocabulary
from etpo.models.distribution import TokenDistribution, scale_logits, token_distribution
from etpo.models.loading import expanded, load_model, load_tokenizer
from etpo.models.probe import check_forwards
from etpo.models.prompting import PromptTemplate
from etpo.models.shared_prompt import checkpoint_layers, forward_actions
from etpo.models.token_text import added_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("eager", "sdpa", "flash_attention_2")


class PromptBatch(NamedTuple):
    """ids: int64 [B, P], padded on the left; mask: bool [B, P]; dropped: tokens cut in all.

    rests: `Prompt.rest` of every row; () where all are empty.
    """

    ids: Tensor
    mask: Tensor
    dropped: int
    rests: tuple[str, ...] = ()


def tiny_checkpoint() -> str:
    """The folder of the embedded base model."""
    return str(Path(__file__).parent / "tiny" / "checkpoint")


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

    def hidden_states(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        *,
        reference: bool = False,
    ) -> Tensor:
        """Compute the last hidden states [B, L, D] at the L prefixes of action_ids [B, L].

        Prefix l is the prompt and the l tokens before token l. Prompts [B, P] are padded on the
        left, actions on the right. Equal rows are computed once, unless activations are
        checkpointed. No gradient reaches the reference.
        """
        with self._weights(reference) as model:
            run = functools.partial(last_hidden_states, trunk_of(model))
            inputs = prompt_ids, prompt_mask, action_ids
            return forward_actions(run, self.model.config, *inputs, self.checkpointed)

    def logits(
        self, hidden: Tensor, *, reference: bool = False, lm_head: nn.Module | None = None
    ) -> Tensor:
        """Compute the model's logits [..., V] of its last hidden states [..., D]."""
        with self._weights(reference) as model:
            head = model.get_output_embeddings() if lm_head is None else lm_head
            logits = project_to_vocabulary(head, hidden)[..., : self.vocabulary_size]
        return scale_logits(logits, self.model.config)

    def log_probs(
        self,
        hidden: Tensor,
        action_ids: Tensor | None = None,
        *,
        reference: bool = False,
        support: Tensor | None = None,
        lm_head: nn.Module | None = None,
    ) -> TokenDistribution:
        """Compute the distribution over the vocabulary at last hidden states [..., D].

        Args:
            hidden: As `hidden_states` returns them, or any selection of them.
            action_ids: int64 [...], the taken tokens, which `min_p` always keeps.
            reference: Use the reference's LM head, without gradient; it keeps all tokens.
            support: bool [..., V], the tokens to keep in place of those that `min_p` selects.
            lm_head: Use this LM head in place of the policy's current one.
        """
        logits = self.logits(hidden, reference=reference, lm_head=lm_head)
        return token_distribution(
            logits,
            self.temperature,
            0.0 if reference else self.min_p,
            support=support,
            action_ids=action_ids,
        )

    @property
    def lm_head(self) -> nn.Module:
        """The policy's LM head."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def lm_head_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the LM head."""
        return [p for p in self.lm_head.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def _weights(self, reference: bool) -> Iterator[nn.Module]:
        """Yield the policy's model, or the reference's without gradient."""
        if not reference:
            yield self.model
            return
        with torch.no_grad():
            if self.reference_model is not None:
                yield self.reference_model
            else:
                with self.model.disable_adapter():
                    yield self.model


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
