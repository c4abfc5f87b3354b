"""Distributions over allowed tokens by plain forwards, independent of the sampler and its trie."""

import torch

from etpo.models.token_text import continued_ids


def tokens_of(policy, choice, rest=""):
    """Return the tokens of a choice, with the one that ends it."""
    return [*continued_ids(policy.tokenizer, rest + choice), policy.end_token]


def next_tokens(policy, choices, ids, rest=""):
    """Return the tokens that continue `ids` to the tokens of a choice."""
    spelled = [tokens_of(policy, choice, rest) for choice in choices]
    return {each[len(ids)] for each in spelled if each[: len(ids)] == list(ids) != each}


def restricted(policy, ids, options=None, model=None):
    """Return the policy's probabilities [V] after tokens `ids`, zero outside of `options`.

    options: the allowed tokens; None: all. model: another model than the policy's, without `min_p`.
    """
    logits = (model or policy.model)(torch.tensor([ids])).logits[0, -1, : policy.vocabulary_size]
    p = (logits.double() / policy.temperature).softmax(-1)
    if options is not None:
        p = p * torch.zeros_like(p).scatter(0, torch.tensor(sorted(options)), 1.0)
    if model is None:
        p = p * (p >= policy.min_p * p.max())
    return p / p.sum()
