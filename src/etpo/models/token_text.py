"""The text that tokens add to the text before them, also where a token is a part of a character."""

import functools
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder puts for bytes that make no character


def added_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text that `ids` add to the text before them, special tokens included.

    `tokenizer.decode` alone treats its first token as the start of a text: SentencePiece-like
    decoders strip one blank there.
    """
    before, text = _anchor(tokenizer)
    return _decode(tokenizer, [*before, *ids])[len(text) :]


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens that add exactly `text` to another text, without special tokens around them.

    SentencePiece-like tokenizers put a blank in front of the first word of a text, which is left
    out here.
    """
    ids = text_ids(tokenizer, text)
    for start in ("", "\n", "a", "."):
        before, joined = text_ids(tokenizer, start), text_ids(tokenizer, start + text)
        following = joined[len(before) :]
        if joined[: len(before)] == before and added_text(tokenizer, following) == text:
            return following
    return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, without special tokens around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """A token that stands for the text before an action, and its own text."""
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
    """Texts of an action's tokens [l], and labels of other tokens in the place of each.

    The texts, joined, are the action's text. A token that ends inside a character has the text "";
    the one that completes the character has all of it. The stop token at the end has the text "",
    too. Labels are never empty: see `label`.
    """
    texts, labels = [], []
    start = 0  # ids[start:place] have no text yet
    for place, token in enumerate(ids):
        due = ids[start:place]
        text = added_text(tokenizer, [*due, token])
        labels.append(
            [
                added_text(tokenizer, [*due, other]).rstrip(BROKEN) or label(tokenizer, other)
                for other in others[place]
            ]
        )
        last = place + 1 == len(ids)
        if last and token in stop_ids:
            texts.append(added_text(tokenizer, due))
        elif text.endswith(BROKEN) and not last:
            texts.append("")
        else:
            texts.append(text)
            start = place + 1
    return texts, labels


def label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A name for a token that adds no text: its broken text, or its entry in the vocabulary."""
    return added_text(tokenizer, [token]) or tokenizer.convert_ids_to_tokens(token)
