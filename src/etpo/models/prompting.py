"""Encode observations as prompt tokens: completion, infilling and chat templates.

Every template cuts a prompt that exceeds `max_tokens` by dropping the OLDEST tokens of its text
(prefix or instruction). Control tokens and the suffix are kept.
"""

from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from etpo.environments.text_env import TextObservation
from etpo.errors import ConfigError, reason
from etpo.models.token_text import BROKEN, added_text, continued_ids, text_ids

# possible starts of an action after a prefix that ends with blanks, and with a line break
_WORDS = ("a", "B", "1")
_LINES = ("    a", "\ta", "a")


class Prompt(NamedTuple):
    """ids: prompt tokens, oldest first; dropped: number of text tokens that were cut off.

    rest: end of the observation's prefix that the action has to repeat, because the tokenizer would
    merge it with the text that follows.
    """

    ids: list[int]
    dropped: int
    rest: str = ""


class PromptBatch(NamedTuple):
    """ids: int64 [B, P], padded on the left; mask: bool [B, P]; dropped: number of cut tokens.

    rests: `Prompt.rest` of every row. choices: admissible actions of every row, None for any text.
    """

    ids: Tensor
    mask: Tensor
    dropped: int
    rests: tuple[str, ...]
    choices: tuple[tuple[str, ...] | None, ...]


class PromptTemplate(Protocol):
    """Encode an observation in at most `max_tokens` tokens."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt: ...


def _fit(
    before: list[int], text: list[int], after: list[int], max_tokens: int, rest: str = ""
) -> Prompt:
    """Join the parts to a prompt of the last tokens of `text` that fit."""
    fixed = len(before) + len(after)
    _check_room(max_tokens, fixed)
    kept = text[fixed - max_tokens :]
    return Prompt(before + kept + after, len(text) - len(kept), rest)


def _check_room(max_tokens: int, fixed: int) -> None:
    if fixed >= max_tokens:
        raise ConfigError(
            f"model.max_prompt_tokens={max_tokens} leaves no room for the prompt: its fixed part "
            f"alone has {fixed} tokens"
        )


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text; most have none."""
    whole, plain = tokenizer("a")["input_ids"], text_ids(tokenizer, "a")
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]


def open_prefix(tokenizer: PreTrainedTokenizerBase, prefix: str) -> tuple[list[int], str]:
    """Return the tokens of `prefix` that do not depend on the next text, and the remaining text.

    A tokenizer may merge white space at the end of a prefix with the text after it, as in " go" or
    in a line break with indentation. A model has then hardly ever seen that white space as a token.
    If an action begins with a word, or after a line break with an indented line, the tokens of
    prompt and action equal the tokens of the joined text.
    """
    ids = text_ids(tokenizer, prefix)
    stem = prefix.rstrip()
    if not stem or stem == prefix:
        return ids, ""
    kept = len(ids)
    for following in _LINES if "\n" in prefix[len(stem) :] else _WORDS:
        joined = text_ids(tokenizer, prefix + following)
        changed = (i for i in range(kept) if joined[i : i + 1] != ids[i : i + 1])
        kept = next(changed, kept)
    return (ids[:kept], added_text(tokenizer, ids[kept:])) if kept else (ids, "")


class CompletionTemplate:
    """Encode the observation's prefix, up to where its tokens depend on the action after it.

    An empty prefix is encoded as the BOS token; `encode` raises ConfigError if there is none.
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
    """Encode `begin prefix hole suffix end`, the order of fill-in-the-middle models.

    begin, hole, end: the model's control tokens, for example `<fim_prefix>`, `<fim_suffix>`,
    `<fim_middle>`; `encode` raises ConfigError if the tokenizer lacks one. The prefix is tokenized
    as a new text, suffix and action as the continuation of a text, as in CodeLlama
    (arXiv 2308.12950).
    """

    def __init__(self, begin: str, hole: str, end: str) -> None:
        self.control_tokens = (begin, hole, end)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        vocabulary = tokenizer.get_vocab()
        for token in self.control_tokens:
            if token not in vocabulary:
                raise ConfigError(
                    f"model.prompt: {tokenizer.name_or_path} has no token {token!r}; choose the "
                    "prompt of the model's own family or model/prompt=completion"
                )
        begin, hole, end = (vocabulary[token] for token in self.control_tokens)
        after = [hole, *continued_ids(tokenizer, observation["suffix"]), end]
        text = text_ids(tokenizer, observation["prefix"])
        return _fit([*_leading_ids(tokenizer), begin], text, after, max_tokens)


class ChatTemplate:
    """Encode the observation's instruction as one user turn with the tokenizer's chat template.

    The ids are `tokenizer.apply_chat_template(..., tokenize=True, add_generation_prompt=True)`.
    `encode` raises ConfigError if there is no template, or if it does not render a user turn.
    """

    _MARK = "etpomark"

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        text, in_parts = observation["instruction"], self._reads_parts(tokenizer)
        ids = self._render(tokenizer, text, in_parts, tokenize=True)
        if len(ids) <= max_tokens:
            return Prompt(ids, 0)
        words = text_ids(tokenizer, text)
        kept = len(words)
        while len(ids) > max_tokens and kept > 1:
            kept = max(1, kept - (len(ids) - max_tokens))
            text = added_text(tokenizer, words[-kept:]).lstrip(BROKEN)
            ids = self._render(tokenizer, text, in_parts, tokenize=True)
        _check_room(max_tokens, len(ids) - kept)
        return Prompt(ids, len(words) - kept)

    def _reads_parts(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether the template reads a message as a list of parts, not as a text."""
        name, other = tokenizer.name_or_path, "choose a completion or infilling prompt"
        if tokenizer.chat_template is None:
            raise ConfigError(f"model.prompt: {name} has no chat template; {other}")
        fault = "it shows no text of the user's turn"
        for in_parts in (False, True):
            try:
                shown = self._render(tokenizer, self._MARK, in_parts, tokenize=False)
                if self._MARK in shown.lower():
                    return in_parts
            except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
                fault = reason(error)
        raise ConfigError(
            f"model.prompt: the chat template of {name} cannot be used ({fault}); {other}"
        )

    @staticmethod
    def _render(
        tokenizer: PreTrainedTokenizerBase, text: str, in_parts: bool, tokenize: bool
    ) -> Any:
        """Return the text of the prompt or, with `tokenize`, its ids."""
        turn = {"role": "user", "content": [{"type": "text", "text": text}] if in_parts else text}
        return tokenizer.apply_chat_template(
            [turn], tokenize=tokenize, add_generation_prompt=True, return_dict=False
        )
