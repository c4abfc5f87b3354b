"""Sample actions with a key-value cache, from exactly the distribution that is trained."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from etpo.generation.action_space import Matcher, action_spaces, forced_prefix, forced_tokens
from etpo.generation.prefix_cache import Decoder
from etpo.generation.prompt_cache import PromptCache
from etpo.models.causal_lm import trunk_of
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptBatch
from etpo.models.stopping import completes_stop_string
from etpo.rollout.types import Decisions


class Sample(NamedTuple):
    """Sampled actions of B prompts.

    step_mask is true for tokens that were drawn, at least one per action; the action space forced
    the others. `allowed` are the tokens of the action space, `support` those with a probability, as
    bits (`token_columns`). length_limited: cut after `max_new_tokens` tokens.
    """

    ids: Tensor  # int64 [B, L]
    mask: Tensor  # bool [B, L]
    step_mask: Tensor  # bool [B, L]
    hidden_states: Tensor  # [B, L, D], the last ones, from which tokens were drawn; 0 elsewhere
    allowed: Tensor  # int32 [B, L, W] or [B, L, 0]
    support: Tensor  # int32 [B, L, W] or [B, L, 0]
    length_limited: Tensor  # bool [B]


class Action:
    """Tokens of one action so far; the decoder has not read the `pending` ones."""

    def __init__(self, matcher: Matcher | None, forced: Sequence[int], rest: str) -> None:
        self.matcher, self.rest = matcher, rest
        self.ids, self.steps, self.pending = list(forced), [False] * len(forced), list[int]()
        self.ended = self.length_limited = False

    def append(self, policy: LanguageModelPolicy, token: int, max_new_tokens: int) -> None:
        """Append a drawn token and the tokens that it forces."""
        following = [token]
        if self.matcher is not None:
            self.matcher.accept(token)
            following += forced_tokens(self.matcher)
        for number, each in enumerate(following):
            self.ids.append(each)
            self.steps.append(number == 0)
            self.pending.append(each)
            self.length_limited = len(self.ids) == max_new_tokens
            if self.ends(policy) or self.length_limited:
                self.ended, self.length_limited = True, not self.ends(policy)
                return

    def ends(self, policy: LanguageModelPolicy) -> bool:
        """Return whether the last token is a stop token or completes a stop string."""
        strings = policy.stop_strings
        return self.ids[-1] in policy.stop_ids or bool(
            strings and completes_stop_string(policy.tokenizer, strings, self.ids, self.rest)
        )


@torch.no_grad()
def generate(
    policy: LanguageModelPolicy,
    prompts: PromptBatch,
    max_new_tokens: int,
    generator: torch.Generator | None,
    grammar: Mapping[str, str] | None = None,
    prompt_cache: PromptCache | None = None,
) -> Sample:
    """Generate one action per prompt.

    An action ends with a stop token of the policy, with the token that completes a stop string,
    or after `max_new_tokens` tokens. Each distinct prompt is computed once. Tokens that an action
    space forces are read together with the token before them. Ended actions are dropped from the
    computation once they are half of it.

    Args:
        generator: On the policy's device; its draws for an action do not depend on when others
            end. None: greedy decoding, of each distinct prompt once.
        grammar: Of actions without `choices`; None: any text.
        prompt_cache: Of the last turn, with the same weights; None: a new one.

    Raises:
        ConfigError: choices or the grammar do not fit the tokenizer.
    """
    if generator is None:
        prompts, index = distinct_prompts(prompts)
    device, size = policy.device, len(prompts.ids)
    spaces = action_spaces(policy, prompts, grammar, max_new_tokens)
    actions = [
        Action(*forced_prefix(space, max_new_tokens), rest)
        for space, rest in zip(spaces, prompts.rests, strict=True)
    ]
    inputs = (x.to(device) for x in with_forced(prompts, actions))
    cache = (prompt_cache or PromptCache()) if policy.packs_prefixes else None
    options = max_new_tokens, policy.shares_prefixes, cache
    decoder = Decoder(trunk_of(policy.model), *inputs, *options)
    record = Recorder(policy, size, max_new_tokens, any(space is not None for space in spaces))
    while True:
        rows = decoder.rows.tolist()
        due = [p for p, row in enumerate(rows) if not (actions[row].ended or actions[row].pending)]
        noise = None
        if generator is not None:
            noise = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
        if due:
            drawn = [rows[place] for place in due]
            tokens = record.draw(actions, drawn, decoder.hidden_states[due, -1], noise)
            for row, token in zip(drawn, tokens, strict=True):
                actions[row].append(policy, token, max_new_tokens)
        running = [not actions[row].ended for row in rows]
        if not any(running):
            break
        if sum(running) <= len(rows) // 2:
            decoder.select_rows(torch.tensor(running, device=device))
        decoder.step(*pending_tokens(policy, actions, decoder))
    sample = record.sample(actions)
    return sample if generator is not None else Sample(*(x[index] for x in sample))


class Recorder:
    """Draw tokens and record where they were drawn from.

    constrained: whether an action space restricts some action.
    """

    def __init__(
        self, policy: LanguageModelPolicy, size: int, max_new_tokens: int, constrained: bool
    ) -> None:
        self.policy, self.constrained = policy, constrained
        self.words = -(-policy.vocabulary_size // 32)
        shape, device = (size, max_new_tokens), policy.device
        self.hidden_states: Tensor | None = None
        truncated = constrained or policy.min_p > 0
        self.allowed, self.support = (
            torch.zeros(*shape, self.words * kept, dtype=torch.int32, device=device)
            for kept in (constrained, truncated)
        )
        self.shape = shape

    def draw(
        self, actions: list[Action], rows: list[int], states: Tensor, noise: Tensor | None
    ) -> list[int]:
        """Return the next tokens of the actions `rows`; greedy without `noise` [B].

        states: hidden states [n, D].
        """
        policy = self.policy
        words = [
            np.full(self.words, -1, np.int32) if matcher is None else matcher.allowed()
            for matcher in (actions[row].matcher for row in rows if self.constrained)
        ]
        allowed = torch.zeros(len(rows), 0, dtype=torch.int32)
        if self.constrained:
            allowed = torch.from_numpy(np.stack(words))
        allowed = allowed.to(states.device)
        log_probs, ids, support = policy.supported(states, allowed)
        chosen = log_probs.argmax(-1) if noise is None else inverse_cdf(log_probs, noise[rows])
        places = [len(actions[row].ids) for row in rows]
        if self.hidden_states is None:
            self.hidden_states = states.new_zeros(*self.shape, states.shape[-1])
        self.hidden_states[rows, places] = states
        self.allowed[rows, places] = allowed
        self.support[rows, places] = support
        tokens = chosen if ids is None else ids[chosen]
        return [int(token) for token in tokens.tolist()]

    def sample(self, actions: list[Action]) -> Sample:
        """Return the actions, cut to the length of the longest."""
        longest = max(len(action.ids) for action in actions)
        ids = torch.full((len(actions), longest), self.policy.pad_id)
        masks = torch.zeros(2, len(actions), longest, dtype=torch.bool)
        for row, action in enumerate(actions):
            ids[row, : len(action.ids)] = torch.tensor(action.ids)
            masks[0, row, : len(action.ids)] = True
            masks[1, row, : len(action.ids)] = torch.tensor(action.steps)
        limited = torch.tensor([action.length_limited for action in actions])
        assert self.hidden_states is not None
        recorded = (self.hidden_states, self.allowed, self.support)
        device = self.hidden_states.device
        hidden, allowed, support = (x[:, :longest] for x in recorded)
        ids, mask, step_mask, limited = (x.to(device) for x in (ids, *masks, limited))
        return Sample(ids, mask, step_mask, hidden, allowed, support, limited)


def first_decisions(
    policy: LanguageModelPolicy,
    prompts: PromptBatch,
    max_new_tokens: int,
    grammar: Mapping[str, str] | None,
) -> Decisions:
    """Return the first steps of actions at `prompts`, with placeholders of their tokens."""
    rows, sets = [], []
    words = -(-policy.vocabulary_size // 32)
    for space in action_spaces(policy, prompts, grammar, max_new_tokens):
        matcher, forced = forced_prefix(space, max_new_tokens)
        bits = np.full(words, -1, np.int32) if matcher is None else matcher.allowed()
        octets = np.unpackbits(bits.view(np.uint8), bitorder="little")
        rows.append(torch.tensor([*forced, int(octets.argmax())]))
        sets.append(torch.from_numpy(bits))
    ids = pad_sequence(rows, batch_first=True, padding_value=policy.pad_id)
    last = torch.tensor([len(row) - 1 for row in rows])[:, None]
    step_mask = torch.arange(ids.shape[1]) == last
    allowed = torch.zeros(*ids.shape, 0, dtype=torch.int32)
    if grammar is not None or any(choices is not None for choices in prompts.choices):
        allowed = step_mask[..., None] * torch.stack(sets)[:, None]
    return Decisions(prompts.ids, prompts.mask, ids, step_mask, allowed)


def with_forced(prompts: PromptBatch, actions: Sequence[Action]) -> tuple[Tensor, Tensor]:
    """Append the tokens that start each action to its prompt: ids and mask, [B, P + forced]."""
    longest = max(len(action.ids) for action in actions)
    if longest == 0:
        return prompts.ids, prompts.mask
    rows = [
        torch.cat([ids[mask], torch.tensor(action.ids, dtype=ids.dtype)])
        for ids, mask, action in zip(prompts.ids, prompts.mask, actions, strict=True)
    ]
    return pad_left(rows)


def pending_tokens(
    policy: LanguageModelPolicy, actions: Sequence[Action], decoder: Decoder
) -> tuple[Tensor, Tensor]:
    """Take tokens for the decoder: ids and mask [b, s], padded on the left; none of ended actions.

    A decoder whose rows must stay aligned reads one token at a time.
    """
    rows = [actions[row] for row in decoder.rows.tolist()]
    width = max(len(row.pending) for row in rows if not row.ended) if decoder.shared else 1
    taken = [[] if row.ended else row.pending[:width] for row in rows]
    for row in rows:
        row.pending = row.pending[width:]
    ids, mask = pad_left([torch.tensor(tokens, dtype=torch.long) for tokens in taken])
    ids = ids.masked_fill(~mask, policy.pad_id)
    return ids.to(policy.device), mask.to(policy.device)


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of ids as one tensor, padded on the left with 0, and its mask."""
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    sizes = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) >= ids.shape[1] - sizes[:, None]


def inverse_cdf(log_p: Tensor, noise: Tensor) -> Tensor:
    """Return the token whose share of [0, 1) holds `noise`: [B, V] and [B] -> int64 [B].

    `noise` is float64 in [0, 1). In float64 noise * total < total, so that no token of probability
    0 is drawn.
    """
    cdf = log_p.exp().cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]


def distinct_prompts(prompts: PromptBatch) -> tuple[PromptBatch, list[int]]:
    """Return each distinct prompt once, and the place of every row's among them."""
    tokens = torch.cat([prompts.ids, prompts.mask], dim=1).tolist()
    place: dict[Any, int] = {}
    keys = zip(map(tuple, tokens), prompts.rests, prompts.choices, strict=True)
    index = [place.setdefault(key, len(place)) for key in keys]
    rows = [index.index(number) for number in range(len(place))]
    ids, mask = prompts.ids[rows], prompts.mask[rows]
    rests, choices = (tuple(x[row] for row in rows) for x in (prompts.rests, prompts.choices))
    return PromptBatch(ids, mask, prompts.dropped, rests, choices), index


def decode_actions(policy: LanguageModelPolicy, prompts: PromptBatch, sample: Sample) -> list[str]:
    """Return the text of every sampled action [B]."""
    rows = zip(sample.ids.cpu(), sample.mask.cpu(), prompts.rests, strict=True)
    return [policy.decode(ids[mask].tolist(), rest) for ids, mask, rest in rows]
