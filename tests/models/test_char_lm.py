"""The character-level language model of token MDPs, loaded as a Hugging Face user would."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from etpo.environments.token_mdp_env import TokenMDPEnv, action_texts, random_mdp
from etpo.errors import ConfigError
from etpo.generation.sampler import decode_actions, generate
from etpo.models.char_lm import build_char_lm
from etpo.models.prompting import CompletionTemplate


def policy(folder, **changes):
    settings = {"vocabulary_size": 4, "init_seed": 0, "max_prompt_tokens": 8} | changes
    return build_char_lm(str(folder), CompletionTemplate(), **settings)


def test_the_vocabulary_is_that_of_the_mdp(tmp_path):
    policy(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert tokenizer.get_vocab() == {"a": 0, "b": 1, "c": 2, "</s>": 3}
    assert tokenizer.eos_token_id == model.config.eos_token_id == 3
    assert model.config.vocab_size == 4
    assert tokenizer("cab")["input_ids"] == [3, 2, 0, 1]
    assert tokenizer.decode([2, 0, 1]) == "cab"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_seed_alone_decides_the_weights(tmp_path):
    def weights(name, seed):
        policy(tmp_path / name, init_seed=seed)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight

    before = torch.random.get_rng_state()
    first = weights("a", 0)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(7)
    assert torch.equal(first, weights("b", 0))
    assert not torch.equal(first, weights("c", 1))


def test_a_checkpoint_that_is_there_is_kept(tmp_path):
    first = policy(tmp_path / "model").model.lm_head.weight
    again = policy(tmp_path / "model", init_seed=1).model.lm_head.weight
    assert torch.equal(first, again)
    with pytest.raises(ConfigError, match="model.init_seed=-1: allowed is from 0"):
        policy(tmp_path / "other", init_seed=-1)


def test_every_sampled_action_is_one_of_the_mdp_and_its_text_says_which(tmp_path):
    mdp = random_mdp(seed=0, num_states=4, vocabulary_size=4, length=2)
    environment = TokenMDPEnv(mdp=mdp, num_envs=4)
    model = policy(tmp_path / "model")
    prompts = model.encode(environment.observations * 250)
    taken = generate(model, prompts, mdp.length, torch.Generator().manual_seed(0))
    texts = decode_actions(model, prompts, taken)
    numbers = {
        tuple(token for _, token in path): number for number, path in enumerate(mdp.tree.paths)
    }
    for ids, mask, text in zip(taken.ids, taken.mask, texts, strict=True):
        assert action_texts(mdp).index(text) == numbers[tuple(ids[mask].tolist())]
        assert environment.error(text) is None
    assert set(texts) == set(action_texts(mdp))
