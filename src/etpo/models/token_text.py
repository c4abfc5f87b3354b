"""The text that tokens add to a preceding text, also if a token is only part of a character."""

import functools
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # a decoder's replacement for bytes that form no character


def added_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text that `ids` add to a preceding text, special tokens included.

    `tokenizer.decode` alone treats its first token as the start of a text, where SentencePiece-like
    decoders strip a blank.
    """
    before, text = _anchor(tokenizer)
    return _decode(tokenizer, [*before, *ids])[len(text) :]


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return tokens that add exactly `text` to a preceding text, without special tokens.

    They lack the blank that SentencePiece-like tokenizers put in front of a text's first word.
    """
    for start in ("", "\n", "a", "."):
        before, joined = text_ids(tokenizer, start), text_ids(tokenizer, start + text)
        following = joined[len(before) :]
        if joined[: len(before)] == before and added_text(tokenizer, following) == text:
            return following
    return text_ids(tokenizer, text)


def spelled_ids(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str
) -> tuple[list[int], str]:
    """Return the longest beginning of `ids` that adds a beginning of `text`, and the other text."""
    for count in range(len(ids), 0, -1):
        added = added_text(tokenizer, ids[:count])
        if text.startswith(added):
            return list(ids[:count]), text[len(added) :]
    return [], text


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text without special tokens around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Return one token that stands for a preceding text, and its text."""
    before = text_ids(tokenizer, "a")[-1:] or [0]
    return before, _decode(tokenizer, before)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(
        ids,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
        spaces_between_special_tokens=False,
    )


def token_texts(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    others: Sequence[Sequence[int]],
    stop_ids: Collection[int],
) -> tuple[list[str], list[list[str]]]:
    """Return the texts of an action's tokens [l], and labels of the tokens `others` at each place.

    The joined texts are the action's text. A token that ends inside a character has the text "";
    the one that completes the character has all of it. A stop token at the end has the text "".
    Labels are never empty: see `label`.
    """
    texts, labels = [], []
    start = 0  # ids[start:place] have no text yet
    for place, token in enumerate(ids):
        due = ids[start:place]
        added = [added_text(tokenizer, [*due, other]).rstrip(BROKEN) for other in others[place]]
        labels.append([x or label(tokenizer, i) for x, i in zip(added, others[place], strict=True)])
        last = place + 1 == len(ids)
        text = added_text(tokenizer, due if last and token in stop_ids else [*due, token])
        if text.endswith(BROKEN) and not last:
            texts.append("")
        else:
            texts.append(text)
            start = place + 1
    return texts, labels


def label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a name for a token that adds no text: its broken text or its vocabulary entry."""
    return added_text(tokenizer, [token]) or tokenizer.convert_ids_to_tokens(token)
