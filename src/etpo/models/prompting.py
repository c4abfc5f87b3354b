"""Encode observations as prompt tokens: completion, infilling and chat templates.

Every template cuts a prompt that exceeds `max_tokens` by dropping the OLDEST tokens of its text
(prefix or instruction); control tokens and the suffix are kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from etpo.environments.text_env import TextObservation
from etpo.errors import ConfigError, reason
from etpo.models.token_text import BROKEN, added_text, continued_ids, text_ids

# How an action may go on after a prefix that ends with blanks, and after one that ends with a line.
_WORDS = ("a", "B", "1")
_LINES = ("    a", "\ta", "a")


class Prompt(NamedTuple):
    """ids: prompt tokens, oldest first; dropped: number of text tokens that were cut off.

    rest: the end of the observation's prefix that the action spells, because the tokenizer would
    merge it with what follows.
    """

    ids: list[int]
    dropped: int
    rest: str = ""


class PromptBatch(NamedTuple):
    """ids: int64 [B, P], padded on the left; mask: bool [B, P]; dropped: number of cut tokens.

    rests: `Prompt.rest` of every row; () if all are empty.
    """

    ids: Tensor
    mask: Tensor
    dropped: int
    rests: tuple[str, ...] = ()


class PromptTemplate(Protocol):
    """Encodes an observation in at most `max_tokens` tokens."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt: ...


def encode_batch(
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    observations: Sequence[TextObservation],
    max_tokens: int,
    embedding_size: int,
    pad_id: int,
) -> PromptBatch:
    """Encode observations as left-padded tensors on the CPU; equal ones are tokenized once.

    Raises:
        ConfigError: a prompt has a token without a row in the embedding.
    """
    encoded = {
        texts: template.encode(tokenizer, TextObservation(texts), max_tokens)
        for texts in {tuple(o.items()) for o in observations}
    }
    largest = max(i for prompt in encoded.values() for i in prompt.ids)
    if largest >= embedding_size:  # a token that was added without a row
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"model.name_or_path={tokenizer.name_or_path}: a prompt has the token "
            f"{token!r} ({largest}); allowed are the {embedding_size} of its embedding"
        )
    prompts = [encoded[tuple(o.items())] for o in observations]
    width = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = True
    rests = tuple(p.rest for p in prompts)
    return PromptBatch(ids, mask, sum(p.dropped for p in prompts), rests if any(rests) else ())


def check_prompt(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    """Raise ConfigError if the tokenizer does not fit the template."""
    template.encode(tokenizer, TextObservation(instruction="a", prefix="a", suffix="a"), max_tokens)


def _fit(
    before: list[int], text: list[int], after: list[int], max_tokens: int, rest: str = ""
) -> Prompt:
    room = max_tokens - len(before) - len(after)
    if room < 1:
        raise _no_room(max_tokens, len(before) + len(after))
    kept = text[-room:]
    return Prompt(before + kept + after, len(text) - len(kept), rest)


def _no_room(max_tokens: int, fixed: int) -> ConfigError:
    return ConfigError(
        f"model.max_prompt_tokens={max_tokens} leaves no room for the prompt: its fixed part "
        f"alone has {fixed} tokens"
    )


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text; none for most."""
    whole, plain = tokenizer("a")["input_ids"], text_ids(tokenizer, "a")
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]


def open_prefix(tokenizer: PreTrainedTokenizerBase, prefix: str) -> tuple[list[int], str]:
    """Tokens of `prefix` that stay the same whatever follows it, and the text of the others.

    White space at the end of a prefix may be a token together with what follows, such as " go" or
    a line break with the indentation after it: a model has hardly ever seen it as a token of its
    own. Where an action begins with a word, or with an indented line after a line break, the
    tokens of prefix and action equal the tokens of the joined text.
    """
    ids = text_ids(tokenizer, prefix)
    stem = prefix.rstrip()
    if not stem or stem == prefix:
        return ids, ""
    kept = len(ids)
    for following in _LINES if "\n" in prefix[len(stem) :] else _WORDS:
        joined = text_ids(tokenizer, prefix + following)
        same = (i for i in range(kept) if joined[i : i + 1] != ids[i : i + 1])
        kept = next(same, kept)
    return (ids[:kept], added_text(tokenizer, ids[kept:])) if kept else (ids, "")


class CompletionTemplate:
    """The observation's prefix, up to where its tokens depend on the action that continues it.

    An empty prefix is the tokenizer's BOS token. Raises ConfigError where there is none.
    """

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        text, rest = open_prefix(tokenizer, observation["prefix"])
        before = _leading_ids(tokenizer)
        if text:
            return _fit(before, text, [], max_tokens, rest)
        if not before and tokenizer.bos_token_id is None:
            raise ConfigError(
                f"model.name_or_path={tokenizer.name_or_path}: the tokenizer has no BOS token to "
                "make a prompt of an empty observation; allowed are observations with text"
            )
        return Prompt(before or [tokenizer.bos_token_id], 0)


class InfillingTemplate:
    """`begin prefix hole suffix end`: the prefix-suffix-middle order of fill-in-the-middle models.

    begin, hole, end: the model's control tokens, for example `<fim_prefix>`, `<fim_suffix>`,
    `<fim_middle>`. The prefix is a text of its own, suffix and action continue one, as in
    CodeLlama (arXiv 2308.12950). Raises ConfigError where the tokenizer does not know a control
    token.
    """

    def __init__(self, begin: str, hole: str, end: str) -> None:
        self.control_tokens = (begin, hole, end)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        begin, hole, end = (_token_id(tokenizer, token) for token in self.control_tokens)
        after = [hole, *continued_ids(tokenizer, observation["suffix"]), end]
        text = text_ids(tokenizer, observation["prefix"])
        return _fit([*_leading_ids(tokenizer), begin], text, after, max_tokens)


class ChatTemplate:
    """The observation's instruction as one user turn, in the tokenizer's own chat template.

    The ids are `tokenizer.apply_chat_template(..., tokenize=True, add_generation_prompt=True)`.
    Raises ConfigError where there is no template or it cannot show a user turn.
    """

    _MARK = "etpomark"

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        in_parts = self._reads_parts(tokenizer)
        text = observation["instruction"]
        ids = self._render(tokenizer, text, in_parts, tokenize=True)
        if len(ids) <= max_tokens:
            return Prompt(ids, 0)
        words = text_ids(tokenizer, text)
        kept = len(words)
        while len(ids) > max_tokens and kept > 1:
            kept = max(1, kept - (len(ids) - max_tokens))
            text = added_text(tokenizer, words[-kept:]).lstrip(BROKEN)
            ids = self._render(tokenizer, text, in_parts, tokenize=True)
        if len(ids) > max_tokens:
            raise _no_room(max_tokens, len(ids) - kept)
        return Prompt(ids, len(words) - kept)

    def _reads_parts(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the template wants a message's content as a list of parts, not as a text."""
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"model.prompt: {tokenizer.name_or_path} has no chat template; "
                "choose a completion or infilling prompt"
            )
        fault = "it shows no text of the user's turn"
        for in_parts in (False, True):
            try:
                shown = self._render(tokenizer, self._MARK, in_parts, tokenize=False)
            except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
                fault = reason(error)
                continue
            if self._MARK in shown.lower():
                return in_parts
        raise ConfigError(
            f"model.prompt: the chat template of {tokenizer.name_or_path} cannot be used "
            f"({fault}); choose a completion or infilling prompt"
        )

    @staticmethod
    def _render(
        tokenizer: PreTrainedTokenizerBase, text: str, in_parts: bool, tokenize: bool
    ) -> Any:
        """The text of the prompt, or its ids."""
        content = [{"type": "text", "text": text}] if in_parts else text
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=tokenize,
            add_generation_prompt=True,
            return_dict=False,
        )


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise ConfigError(
            f"model.prompt: {tokenizer.name_or_path} has no token {token!r}; choose the prompt "
            "of the model's own family or model/prompt=completion"
        )
    return index
