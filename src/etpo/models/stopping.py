"""Stop tokens and stop strings: where an action ends."""

import contextlib
from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from etpo.errors import ConfigError
from etpo.escapes import unescaped
from etpo.models.gguf_file import is_gguf
from etpo.models.token_text import added_text, continued_ids


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, stop_tokens: str | Sequence[str] | None, name_or_path: str
) -> list[int]:
    """Return the token ids that end an action: EOS of tokenizer and model, and `stop_tokens`.

    Raises:
        ConfigError: a token is unknown, or there is none.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = as_texts("model.stop_tokens", stop_tokens)
    for token in tokens:
        if token not in vocabulary:
            raise ConfigError(f"model.stop_tokens: the tokenizer has no token {token!r}")
    ids = {vocabulary[token] for token in tokens}
    ids |= set(model_eos_ids(name_or_path)) & set(vocabulary.values())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ConfigError("model.stop_tokens: needed, since the tokenizer has no EOS token")
    return sorted(ids)


def end_token(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], strings: Sequence[str]
) -> int:
    """Return the token that ends an admissible action.

    It is the token of a stop string that is one token, such as a line break after the lines of a
    completion prompt, else the EOS token, else the first stop token.
    """
    spelled = (continued_ids(tokenizer, string) for string in strings)
    single = next((each[0] for each in spelled if len(each) == 1), None)
    if single is not None:
        return single
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ids else ids[0]


def model_eos_ids(name_or_path: str) -> list[int]:
    """Return the EOS ids of generation_config.json or, if it has none, of config.json.

    A GGUF file has no others than its tokenizer's.
    """
    if is_gguf(name_or_path):
        return []
    eos = None
    with contextlib.suppress(OSError):  # most likely there is no such file
        eos = GenerationConfig.from_pretrained(name_or_path).eos_token_id
    if eos is None:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path)
        eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def parse_stop_strings(values: str | Sequence[str] | None) -> list[str]:
    r"""Return `model.stop_strings` as a list, with \n, \r, \t and \\ replaced as in Python.

    A shell passes these escapes as two characters.
    """
    texts = as_texts("model.stop_strings", values)
    return list(map(unescaped, texts))


def as_texts(key: str, values: str | Sequence[str] | None) -> list[str]:
    """Return None, a text or several as a list; raise ConfigError for any other value of `key`."""
    texts = [values] if isinstance(values, str) else () if values is None else values
    if not isinstance(texts, Sequence) or not all(isinstance(v, str) and v for v in texts):
        raise ConfigError(f"{key}={values}: allowed are texts that are not empty, such as [END]")
    return list(texts)


def completes_stop_string(
    tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], ids: Sequence[int], rest: str = ""
) -> bool:
    """Return whether the last of an action's tokens [l] completes a stop string after `rest`."""
    # a token without text is a part of a character: n bytes are at most n tokens
    longest = max(len(stop.encode()) for stop in strings)
    if len(ids) > longest + len(rest):
        ids, rest = ids[-longest:], ""
    text = added_text(tokenizer, ids)
    if rest.startswith(text):
        return False
    return any(stop in text.removeprefix(rest) for stop in strings)
