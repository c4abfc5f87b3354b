"""The text that each token adds to an action, also where a token is a part of a character."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder puts for bytes that make no character


def token_texts(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], others: Sequence[Sequence[int]]
) -> tuple[list[str], list[list[str]]]:
    """Texts of an action's tokens [l], and labels of other tokens in the place of each.

    The texts, joined, are the action's text with nothing stripped. A token that ends inside a
    character has the text ""; the one that completes the character has all of it. Special tokens
    have the text "", too. Labels are never empty: see `label`.
    """
    texts, labels = [], []
    context = start = 0  # ids[context:start] precede the tokens ids[start:place] without a text yet
    for place, token in enumerate(ids):
        before = len(decode(tokenizer, ids[context:start]))
        due = ids[context:place]
        text = decode(tokenizer, [*due, token])[before:]
        labels.append(
            [
                decode(tokenizer, [*due, other])[before:].rstrip(BROKEN) or label(tokenizer, other)
                for other in others[place]
            ]
        )
        if text.endswith(BROKEN) and place + 1 < len(ids):
            texts.append("")
        else:
            texts.append(text)
            context, start = start, place + 1
    return texts, labels


def label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What to call a token that adds no text: its name if it is special, else its broken text."""
    return decode(tokenizer, [token]) or tokenizer.convert_ids_to_tokens(token)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids` without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
