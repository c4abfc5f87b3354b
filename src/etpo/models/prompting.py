"""Encode observations as prompt tokens: completion and infilling templates.

`etpo.models.chat_template` has the chat template. Every template cuts a prompt that exceeds
`max_tokens` by dropping the OLDEST tokens of its text. Control tokens and the suffix are kept.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from etpo.environments.text_env import TextObservation
from etpo.errors import ConfigError
from etpo.models.token_text import added_text, continued_ids, spelled_ids, text_ids

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


class Turn(NamedTuple):
    """The last turn of a running episode.

    observation: its observation; prompt_ids, rest: the fields of its `Prompt`; action_ids: the
    sampled tokens, including a stop token; text: the text of the action.
    """

    observation: TextObservation
    prompt_ids: Sequence[int]
    rest: str
    action_ids: Sequence[int]
    text: str


class PromptTemplate(Protocol):
    """Encode an observation in at most `max_tokens` tokens."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt: ...

    def extend(
        self,
        tokenizer: PreTrainedTokenizerBase,
        observation: TextObservation,
        turn: Turn,
        stop_ids: Collection[int],
        max_tokens: int,
    ) -> Prompt | None:
        """Return prompt and action of `turn` followed by new tokens.

        None: the observation does not continue the turn's, or the tokens are too many.
        """
        return None

    def check_conversations(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigError if observations with `messages` cannot be encoded."""


def fit(
    before: list[int], text: list[int], after: list[int], max_tokens: int, rest: str = ""
) -> Prompt:
    """Join the parts to a prompt of the last tokens of `text` that fit."""
    fixed = len(before) + len(after)
    check_room(max_tokens, fixed)
    kept = text[fixed - max_tokens :]
    return Prompt(before + kept + after, len(text) - len(kept), rest)


def check_room(max_tokens: int, fixed: int) -> None:
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


def open_prefix(
    tokenizer: PreTrainedTokenizerBase, prefix: str, *, continues: bool = False
) -> tuple[list[int], str]:
    """Return the tokens of `prefix` that do not depend on the next text, and the remaining text.

    A tokenizer may merge white space at the end of a prefix with the text after it, as in " go" or
    in a line break with indentation. A model has then hardly ever seen that white space as a token.
    If an action begins with a word, or after a line break with an indented line, the tokens of
    prompt and action equal the tokens of the joined text.

    continues: `prefix` follows another text; there may be no such token. Otherwise there is one.
    """
    tokens = continued_ids if continues else text_ids
    ids = tokens(tokenizer, prefix)
    stem = prefix.rstrip()
    if stem == prefix or not (stem or continues):
        return ids, ""
    kept = len(ids)
    for following in _LINES if "\n" in prefix[len(stem) :] else _WORDS:
        joined = tokens(tokenizer, prefix + following)
        changed = (i for i in range(kept) if joined[i : i + 1] != ids[i : i + 1])
        kept = next(changed, kept)
    if kept == 0 and not continues:
        return ids, ""
    return ids[:kept], added_text(tokenizer, ids[kept:])


class CompletionTemplate(PromptTemplate):
    """Encode the observation's prefix, up to where its tokens depend on the action after it.

    An empty prefix is encoded as the BOS token; `encode` raises ConfigError if there is none.
    """

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        text, rest = open_prefix(tokenizer, observation["prefix"])
        before = _leading_ids(tokenizer)
        if text:
            return fit(before, text, [], max_tokens, rest)
        if not before and tokenizer.bos_token_id is None:
            raise ConfigError(
                f"model.name_or_path={tokenizer.name_or_path}: the tokenizer has no BOS token to "
                "make a prompt of an empty observation; allowed are observations with text"
            )
        return Prompt(before or [tokenizer.bos_token_id], 0)

    def extend(
        self,
        tokenizer: PreTrainedTokenizerBase,
        observation: TextObservation,
        turn: Turn,
        stop_ids: Collection[int],
        max_tokens: int,
    ) -> Prompt | None:
        """Extend the prompt if the prefix begins with the last prefix and the action's text.

        Sampled tokens are kept as far as they spell the prefix, so a stop token is dropped.
        """
        last, prefix = turn.observation["prefix"], observation["prefix"]
        if not prefix.startswith(last + turn.text):
            return None
        text = turn.rest + prefix[len(last) :]
        kept, text = spelled_ids(tokenizer, turn.action_ids, text)
        added, rest = open_prefix(tokenizer, text, continues=True)
        ids = [*turn.prompt_ids, *kept, *added]
        return Prompt(ids, 0, rest) if len(ids) <= max_tokens else None


class InfillingTemplate(PromptTemplate):
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
        return fit([*_leading_ids(tokenizer), begin], text, after, max_tokens)
