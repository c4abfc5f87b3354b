"""Decoding caches: which one is chosen, and that sharing prompts changes no number."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from etpo.generation.prefix_cache import Decoder, PerRowCache, SharedPrefixCache
from etpo.models.causal_lm import trunk_of

SIZES = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
# prompts of 2 to 6 tokens, padded on the left; rows 1, 3, 5 and rows 0, 4 have equal ones
PROMPTS = [[7, 8], [3, 4, 5, 6, 7, 8], [9, 9, 9], [3, 4, 5, 6, 7, 8], [7, 8], [3, 4, 5, 6, 7, 8]]


def fresh(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def llama(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, **changes}
    return LlamaConfig(**SIZES, **sizes, initializer_range=0.2)


def windowed(window):
    return Qwen2Config(
        **SIZES,
        hidden_size=32,
        intermediate_size=64,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=1,
        initializer_range=0.2,
    )


def prompts():
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    return ids, torch.arange(width) >= width - torch.tensor([[len(p)] for p in PROMPTS])


@torch.no_grad()
def decode(model, actions, dropped):
    """Logits [b, V] of the rows that are left, after two tokens each; some rows go in between."""
    decoder = Decoder(trunk_of(model), *prompts(), actions.shape[1], share_prefixes=True)
    for step in range(actions.shape[1]):
        if step == dropped:
            decoder.select_rows((decoder.rows != 1) & (decoder.rows != 0) & (decoder.rows != 2))
        token = actions[decoder.rows, step : step + 1]
        decoder.step(token, torch.ones_like(token, dtype=torch.bool))
    logits = model.get_output_embeddings()(decoder.hidden_states[:, 0])
    return decoder.rows, logits, decoder.cache


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [llama(), llama(num_key_value_heads=4)], ids=["grouped", "plain"]
)
def test_rows_read_several_tokens_at_once_or_none(config):
    """Padded on the left, beyond the length that was reserved, and with rows dropped between."""
    model = fresh(config)
    decoder = Decoder(trunk_of(model), *prompts(), 4, share_prefixes=True)
    assert decoder.shared
    generator = torch.Generator().manual_seed(1)
    read = [[] for _ in PROMPTS]
    for number, widths in enumerate(([1, 3, 2, 0, 3, 1], [1] * 6, [4, 0, 1, 2, 4, 3])):
        if number == 2:
            decoder.select_rows((decoder.rows != 1) & (decoder.rows != 4))
        rows = decoder.rows.tolist()
        counts = torch.tensor([widths[row] for row in rows])[:, None]
        width = int(counts.max())
        tokens = torch.randint(50, (len(rows), width), generator=generator)
        seen = torch.arange(width) >= width - counts
        decoder.step(tokens, seen)
        for row, each, mask in zip(rows, tokens, seen, strict=True):
            read[row] += each[mask].tolist()
            if mask.any():
                whole = torch.tensor([PROMPTS[row] + read[row]])
                expected = model(whole).logits[0, -1]
                state = decoder.hidden_states[rows.index(row), -1]
                found = model.get_output_embeddings()(state)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert max(map(len, read)) > 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (llama(), SharedPrefixCache),
        (llama(num_key_value_heads=4), SharedPrefixCache),
        (windowed(10), SharedPrefixCache),
        (windowed(9), PerRowCache),
        (GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4), SharedPrefixCache),
    ],
    ids=["grouped queries", "plain", "window wide enough", "window too small", "positions"],
)
@pytest.mark.parametrize("dropped", [None, 2])
def test_logits_are_those_of_whole_sequences(config, kind, dropped):
    model = fresh(config)
    before = model.config._attn_implementation
    actions = torch.randint(50, (6, 4), generator=torch.Generator().manual_seed(1))
    rows, logits, cache = decode(model, actions, dropped)
    assert type(cache) is kind
    assert model.config._attn_implementation == before
    assert sorted(rows.tolist()) == ([0, 1, 2, 3, 4, 5] if dropped is None else [3, 4, 5])
    for row, found in zip(rows.tolist(), logits, strict=True):
        whole = torch.tensor(PROMPTS[row] + actions[row].tolist())[None]
        torch.testing.assert_close(found, model(whole).logits[0, -1], rtol=0, atol=1e-5)


def test_prompts_are_held_once_and_only_while_a_row_needs_them():
    model = fresh(llama())
    cache = Decoder(trunk_of(model), *prompts(), 3, share_prefixes=True).cache
    assert [len(keys) for keys, _ in cache.prompts] == [3, 3]
    assert cache.buckets == [
        (slice(0, 1), slice(0, 1)),
        (slice(1, 2), slice(1, 3)),
        (slice(2, 3), slice(3, 6)),
    ]
    assert cache.order[0] == 2
    kept = cache.select_rows((cache.order != 2).nonzero()[:, 0])
    assert len(kept) == 5
    assert [len(keys) for keys, _ in cache.prompts] == [2, 2]
    cache.select_rows(torch.tensor([0, 4]))  # two prompts with a row each: one bucket
    assert cache.buckets == [(slice(0, 2), slice(0, 2))]
