"""How an observation becomes prompt tokens: completion, infilling and chat templates.

Every template cuts a prompt that exceeds `max_tokens` by dropping the OLDEST tokens of its text
(prefix or instruction); control tokens and the suffix are kept.
"""

from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from etpo.environments.text_env import TextObservation
from etpo.errors import ConfigError


class Prompt(NamedTuple):
    """ids: prompt tokens, oldest first; dropped: number of text tokens that were cut off."""

    ids: list[int]
    dropped: int


class PromptTemplate(Protocol):
    """Encodes an observation in at most `max_tokens` tokens."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt: ...


def _fit(before: list[int], text: list[int], after: list[int], max_tokens: int) -> Prompt:
    room = max_tokens - len(before) - len(after)
    if room < 1:
        raise ConfigError(
            f"model.max_prompt_tokens={max_tokens} leaves no room for the prompt: its fixed part "
            f"alone has {len(before) + len(after)} tokens"
        )
    kept = text[-room:]
    return Prompt(before + kept + after, len(text) - len(kept))


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer itself puts in front of a text (a BOS token or nothing)."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


class CompletionTemplate:
    """The observation's prefix as it stands; the action continues it."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        text = _text_ids(tokenizer, observation["prefix"])
        return _fit(_bos(tokenizer), text, [], max_tokens)


class InfillingTemplate:
    """`begin prefix hole suffix end`: the prefix-suffix-middle order of fill-in-the-middle models.

    begin, hole, end: the model's control tokens, for example `<fim_prefix>`, `<fim_suffix>`,
    `<fim_middle>`. Raises ConfigError where the tokenizer does not know one of them.
    """

    def __init__(self, begin: str, hole: str, end: str) -> None:
        self.control_tokens = (begin, hole, end)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        begin, hole, end = (_token_id(tokenizer, token) for token in self.control_tokens)
        after = [hole, *_text_ids(tokenizer, observation["suffix"]), end]
        text = _text_ids(tokenizer, observation["prefix"])
        return _fit([*_bos(tokenizer), begin], text, after, max_tokens)


class ChatTemplate:
    """The observation's instruction as one user turn, in the tokenizer's own chat template."""

    _MARK = "\u241fetpo\u241f"

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"model.prompt: {tokenizer.name_or_path} has no chat template; "
                "choose a completion or infilling prompt"
            )
        message = [{"role": "user", "content": self._MARK}]
        frame = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = frame.split(self._MARK)
        text = _text_ids(tokenizer, observation["instruction"])
        return _fit(_text_ids(tokenizer, before), text, _text_ids(tokenizer, after), max_tokens)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise ConfigError(
            f"model.prompt: {tokenizer.name_or_path} has no token {token!r}; choose the prompt "
            "of the model's own family or model/prompt=completion"
        )
    return index
