"""Each distinct prompt of a batch is computed once."""

import torch

from etpo.models.causal_lm import trunk_of
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.models.shared_prompt import prefill

OBSERVATIONS = [
    {"instruction": "", "prefix": p, "suffix": ""}
    for p in ("go", "a longer prompt", "go", "x", "a longer prompt")
]


def test_distinct_prompts_run_once(checkpoint):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    prompts, trunk, sizes = policy.encode(OBSERVATIONS), trunk_of(policy.model), []
    trunk.register_forward_pre_hook(
        lambda _, args, given: sizes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    filled = prefill(trunk, prompts.ids, prompts.mask)
    assert sizes == [(3, prompts.ids.shape[1])]
    assert len(filled.hidden_states) == len(filled.cache.layers[0].keys) == 3
    assert filled.prompt_index[1] == filled.prompt_index[4] != filled.prompt_index[0]


@torch.no_grad()
def test_prompts_of_equal_ids_differ_by_their_mask(checkpoint):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    ids, trunk = torch.tensor([[9, 7, 8, 7]] * 2), trunk_of(policy.model)
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    filled = prefill(trunk, ids, mask)
    found = filled.hidden_states[filled.prompt_index, 0]
    alone = [
        trunk(row[seen][None]).last_hidden_state[0, -1] for row, seen in zip(ids, mask, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
