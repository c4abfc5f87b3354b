"""Grammars of actions: regular expressions, JSON schemas and Lark's EBNF, by llguidance."""

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from etpo.environments.validation import shown
from etpo.errors import ConfigError, one_line
from etpo.models.policy import LanguageModelPolicy

CACHED = 4096
Result = TypeVar("Result")
KINDS = ("regex", "json_schema", "ebnf")


def per_policy(function: Callable[..., Result]) -> Callable[..., Result]:
    """Cache up to `CACHED` results of a function of a policy and more, as long as it lives."""
    results: WeakKeyDictionary[LanguageModelPolicy, dict[Any, Result]] = WeakKeyDictionary()

    @functools.wraps(function)
    def cached(policy: LanguageModelPolicy, *arguments: Any) -> Result:
        known = results.setdefault(policy, {})
        if arguments not in known:
            if len(known) == CACHED:
                known.clear()
            known[arguments] = function(policy, *arguments)
        return known[arguments]

    return cached


class GrammarMatcher:
    """Position in an action that a grammar generates, of a vocabulary of 32 `words` tokens.

    end_token: follows the text; llguidance allows it alone once nothing else may follow.
    """

    def __init__(self, compiled: Any, words: int, end_token: int) -> None:
        self.matcher, self.words, self.end_token = compiled.deep_copy(), words, end_token
        self.done = False

    def allowed(self) -> np.ndarray:
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.int32)
        return bits[: self.words].copy()

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)
        self.done = token == self.end_token


def check_grammar(grammar: Any) -> dict[str, str] | None:
    """Return a grammar as one kind with its text, None without one.

    Raises:
        ConfigError: it is no mapping with one of `KINDS`.
    """
    if grammar is None:
        return None
    pairs = dict(grammar) if hasattr(grammar, "items") else {}
    if len(pairs) != 1 or not set(pairs) <= set(KINDS):
        raise ConfigError(
            f"environment.grammar={shown(grammar)}: allowed is one of {', '.join(KINDS)} with its "
            "text, such as {regex: '[0-9]+'}"
        )
    ((kind, text),) = pairs.items()
    return {kind: text if isinstance(text, str) else json.dumps(text, default=plain)}


def plain(part: Any) -> dict[str, Any] | list[Any]:
    """Return a mapping or a sequence of the configuration as a dict or a list."""
    return dict(part) if hasattr(part, "items") else list(part)


@per_policy
def compile_grammar(
    policy: LanguageModelPolicy, grammar: tuple[tuple[str, str], ...], rest: str
) -> Any:
    """Return the matcher of a grammar over the policy's tokens.

    Raises:
        ConfigError: llguidance is missing, the grammar does not compile, or the prompt ends with
            white space, `rest`, that the action would have to repeat.
    """
    if rest:
        raise ConfigError(
            f"environment.grammar: a prompt ends with {rest!r}, which the tokenizer merges with "
            "the action; allowed are prompts that end without white space"
        )
    try:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise ConfigError(
            'environment.grammar: needs llguidance: pip install -e ".[grammar]"; allowed is null'
        ) from error
    ((kind, text),) = grammar
    build = {
        "regex": LLMatcher.grammar_from_regex,
        "json_schema": LLMatcher.grammar_from_json_schema,
        "ebnf": LLMatcher.grammar_from_lark,
    }
    try:
        tokenizer = from_tokenizer(
            policy.tokenizer, n_vocab=policy.vocabulary_size, eos_token=policy.end_token
        )
        matcher = LLMatcher(tokenizer, build[kind](text))
        fault = matcher.get_error() if matcher.is_error() else ""
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ConfigError(
            f"environment.grammar.{kind}={shown(text)}: it does not compile, "
            f"{one_line(fault, 200)}; allowed are the grammars of llguidance"
        )
    return matcher
