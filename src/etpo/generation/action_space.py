"""Action spaces: the tokens that may follow each prefix of an action.

An observation with `choices` admits a finite set of texts, a path of a token trie each; an
environment with a `grammar` admits the texts that it generates. Sampling, reference, critic and
losses use the distribution over the allowed tokens (TWOSOME, arXiv 2401.14151, restricts actions to
choices; here the softmax is restricted at each token, for the reference too).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from etpo.environments.validation import shown
from etpo.errors import ConfigError
from etpo.generation.grammar import GrammarMatcher, compile_grammar, per_policy
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptBatch
from etpo.models.token_text import continued_ids

Space = Callable[[], "Matcher"]
Trie = dict[int, Any]  # a token and the tokens that may follow it; empty after the last one


class Matcher(Protocol):
    """Position in one action; `done` after its last token."""

    done: bool

    def allowed(self) -> np.ndarray:
        """Return the tokens that may follow, as bits: int32 [W]."""
        ...

    def accept(self, token: int) -> None:
        """Append a token that is allowed."""
        ...


class ChoiceMatcher:
    """Position in a token trie of choices over a vocabulary of 32 `words` tokens or fewer."""

    def __init__(self, trie: Trie, words: int) -> None:
        self.node, self.words, self.done = trie, words, False

    def allowed(self) -> np.ndarray:
        octets = np.zeros(4 * self.words, dtype=np.uint8)
        for token in self.node:
            octets[token >> 3] |= 1 << (token & 7)
        return octets.view(np.int32)

    def accept(self, token: int) -> None:
        self.node = self.node[token]
        self.done = not self.node


def forced_tokens(matcher: Matcher) -> list[int]:
    """Accept tokens as long as only one may follow, and return them."""
    forced: list[int] = []
    while not matcher.done:
        octets = matcher.allowed().view(np.uint8)
        tokens = np.flatnonzero(np.unpackbits(octets, bitorder="little"))
        if len(tokens) != 1:
            break
        forced.append(int(tokens[0]))
        matcher.accept(forced[-1])
    return forced


def forced_prefix(space: Space | None, max_new_tokens: int) -> tuple[Matcher | None, list[int]]:
    """Return a matcher after the tokens with which every action starts, and these tokens.

    If there is only one action, its first token is drawn all the same: an action has a step.
    """
    if space is None:
        return None, []
    matcher = space()
    forced = forced_tokens(matcher)
    if matcher.done or len(forced) >= max_new_tokens:
        return space(), []
    return matcher, forced


def action_spaces(
    policy: LanguageModelPolicy,
    prompts: PromptBatch,
    grammar: Mapping[str, str] | None,
    max_new_tokens: int,
) -> list[Space | None]:
    """Return a function that makes a matcher for each prompt, None where any text is an action.

    Raises:
        ConfigError: the tokenizer cannot spell a choice, or the grammar does not compile.
    """
    words = -(-policy.vocabulary_size // 32)
    spaces: list[Space | None] = []
    for choices, rest in zip(prompts.choices, prompts.rests, strict=True):
        if choices is not None:
            trie = trie_of(policy, choices, rest, max_new_tokens)
            spaces.append(functools.partial(ChoiceMatcher, trie, words))
        elif grammar is not None:
            compiled = compile_grammar(policy, tuple(grammar.items()), rest)
            spaces.append(functools.partial(GrammarMatcher, compiled, words, policy.end_token))
        else:
            spaces.append(None)
    return spaces


@per_policy
def trie_of(
    policy: LanguageModelPolicy, choices: tuple[str, ...], rest: str, max_new_tokens: int
) -> Trie:
    """Return the trie of the tokens of `choices`, each with an end token.

    rest: `Prompt.rest`, which every action has to repeat.
    """
    trie: Trie = {}
    for choice in choices:
        ids = (*continued_ids(policy.tokenizer, rest + choice), policy.end_token)
        ends = (place for place, token in enumerate(ids) if token in policy.stop_ids)
        text = policy.decode(ids[: next(ends, len(ids)) + 1], rest)
        if text != choice:
            raise ConfigError(
                f"observation['choices']: {shown(choice)} reads {shown(text)} as tokens of "
                f"{policy.key}; allowed are texts that the tokenizer can spell, without stop "
                f"tokens and model.stop_strings {policy.stop_strings}"
            )
        if len(ids) > max_new_tokens:
            raise ConfigError(
                f"rollout.max_new_tokens={max_new_tokens}: the choice {shown(choice)} needs "
                f"{len(ids)}; allowed are {len(ids)} or more"
            )
        node = trie
        for token in ids:
            node = node.setdefault(token, {})
    return trie
