"""Each architecture, small and random: sampled, trained with every critic, resumed, exported.

`pytest -m slow tests/models/test_architectures.py -s` prints the table of docs/models.md.
"""

import json

import gymnasium
import pytest
import torch
from transformers import AutoModelForCausalLM

from etpo import export, train
from etpo.environments.text_env import AnyText
from etpo.errors import ConfigError
from etpo.generation.sampler import generate
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.models.tree_forward import is_recurrent

from .. import by_token
from .architectures import ARCHITECTURES, save_architecture

FAST = ("GPT-2", "OPT-350m", "MPT", "Gemma 2", "Mistral", "Qwen3-Next", "LFM2", "Llama 4", "RWKV")
SHARED = ("Llama", "GPT-2", "GPT-NeoX", "OPT", "Phi-3", "Gemma 2", "Gemma 3", "Qwen2", "Qwen3")
SHARED += ("Mistral", "Mixtral", "OLMo 2", "Granite", "Cohere", "SmolLM3", "StarCoder2", "Llama 4")
# positions in the mask, or recurrent states
ONE_ROW_PER_PATH = ("BLOOM", "Falcon, alibi", "MPT", "Qwen3-Next", "Qwen3.5", "Granite 4 hybrid")
ONE_ROW_PER_PATH += ("Jamba", "Bamba", "LFM2", "Mamba 2")
WORKING = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is None]
PER_ROW = ("BLOOM", "Falcon, rotary", "GPT-OSS", "DeepSeek-V3", "LFM2")
CRITICS = ("full", "lora", "frozen_trunk", "lm_copy")
COLUMNS = ("Architecture", "`model_type`", "Prompt in the cache", "Padded = alone", *CRITICS)
COLUMNS += ("Resume", "Export")
TINY = (
    "environment=gymnasium",
    "environment.id=Lengths-v0",
    "model=causal_lm",
    "model.max_prompt_tokens=100",
    "model.gradient_checkpointing=false",
    "rollout.num_envs=2",
    "rollout.actions_per_iteration=4",
    "rollout.minibatch_size=4",
    "rollout.update_epochs=1",
    "rollout.max_new_tokens=4",
    "algorithm.policy_lr=1e-2",
    "trainer.max_epochs=1",
)


class Lengths(gymnasium.Env):
    """Prompts of several lengths; a longer action is worth more."""

    action_space = observation_space = AnyText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "go " * int(self.np_random.integers(1, 9)), {}

    def step(self, action):
        return "", len(action) / 4, True, False, {}


gymnasium.register("Lengths-v0", entry_point=Lengths)


@pytest.fixture
def small(checkpoint, tmp_path):
    """small(name): the folder of the architecture's checkpoint."""

    def make(name, **changes):
        architecture = ARCHITECTURES[name]
        architecture = architecture._replace(changes=architecture.changes | changes)
        return save_architecture(tmp_path / "model", architecture, checkpoint("llama"))

    return make


def build(folder, name):
    implementation = ARCHITECTURES[name].attn_implementation
    return LanguageModelPolicy(
        str(folder), CompletionTemplate(), attn_implementation=implementation
    )


@torch.no_grad()
def agrees(policy, folder, name):
    """Sampler and annotation against an ordinary forward of each row by transformers alone."""
    implementation = ARCHITECTURES[name].attn_implementation
    alone = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    texts = ("go", "a much longer prompt", "go", "x")
    prompts = policy.encode([{"instruction": "", "prefix": p, "suffix": ""} for p in texts])
    policy.stop_ids = list(range(3, 30))  # so that some actions end before others
    taken = generate(policy, prompts, 8, torch.Generator().manual_seed(0))
    assert taken.mask.any(1).all()
    log_probs = by_token.log_probs(policy, prompts.ids, prompts.mask, taken.ids)
    for row in range(len(texts)):
        prompt, action = prompts.ids[row, prompts.mask[row]], taken.ids[row, taken.mask[row]]
        ids = torch.cat([prompt, action])[None]
        plain = alone(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = plain[:, : policy.vocabulary_size].log_softmax(-1)
        near = {"rtol": 0, "atol": 1e-4}
        torch.testing.assert_close(log_probs[row, : len(action)], expected, **near)
        sampled = policy.log_probs(taken.hidden_states[row, : len(action)]).log_probs
        torch.testing.assert_close(sampled, expected, **near)
    return "yes"


@pytest.mark.parametrize("name", FAST)
def test_padded_rows_agree_with_those_alone_or_are_refused(name, small):
    folder, refused = small(name), ARCHITECTURES[name].refused
    if refused is None:
        agrees(build(folder, name), folder, name)
    else:
        with pytest.raises(ConfigError, match=f"model.name_or_path=.*{refused}"):
            build(folder, name)


@torch.no_grad()
@pytest.mark.parametrize("name", SHARED + PER_ROW)
def test_tokens_are_those_of_plain_decoding_with_the_same_noise(name, small):
    wide = {"sliding_window": 256} if "sliding_window" in ARCHITECTURES[name].changes else {}
    if name == "Llama 4":
        wide = {"attention_chunk_size": 256}
    policy = build(small(name, **wide), name)
    assert policy.shares_prefixes == (name in SHARED)
    policy.stop_ids = list(range(3, 30))
    texts = ("go", "a much longer prompt", "go", "x") * 2
    prompts = policy.encode([{"instruction": "", "prefix": p, "suffix": ""} for p in texts])
    taken = generate(policy, prompts, 8, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(len(texts), dtype=torch.float64, generator=generator) for _ in range(8)]
    for row in range(len(texts)):
        ids, expected = prompts.ids[row, prompts.mask[row]], []
        while len(expected) < 8 and not set(expected) & set(policy.stop_ids):
            logits = policy.model(torch.cat([ids, torch.tensor(expected).long()])[None]).logits
            cdf = logits[0, -1, : policy.vocabulary_size].softmax(-1).double().cumsum(0)
            expected.append(int((cdf / cdf[-1] <= noise[len(expected)][row]).sum()))
        assert taken.ids[row, taken.mask[row]].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("name", WORKING)
def test_states_of_a_tree_are_those_of_separate_rows(name, small):
    """With one forward of a packed row, and with several stages, or with one row for each path."""
    folder = small(name)
    policy, implementation = build(folder, name), ARCHITECTURES[name].attn_implementation
    assert policy.packs_prefixes == (name not in ONE_ROW_PER_PATH)
    alone = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    ids = torch.randint(3, 200, (6, 22), generator=torch.Generator().manual_seed(0))
    ids[1, :16], ids[2, :19], ids[3, :9] = ids[0, :16], ids[1, :19], ids[0, :9]
    expected = torch.stack([alone(row[None], use_cache=False).logits[0, 11:-1] for row in ids])
    expected = expected[..., : policy.vocabulary_size]
    prompts, actions = ids.split([12, 10], dim=1)
    for limit, stages in ((256, 1), (20, 2), (3, 4)):
        tree = by_token.tree_of(prompts, torch.ones_like(prompts).bool(), actions, limit=limit)
        assert len(tree.nodes.stages) == stages
        logits = policy.logits(tree.of_tokens(policy.hidden_states(tree)))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def exported(command, run, out):
    """Exports a run; its policy's logits must be those of the folder that was written."""
    last = run / "checkpoints" / "last.ckpt"
    ended = command(export.main, f"ckpt_path={last}", f"out={out}")
    assert ended.status == 0, ended.err
    policy = export.load_policy(str(last)).model
    implementation = policy.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(out, attn_implementation=implementation)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, policy(ids).logits, rtol=0, atol=1e-5)
    return "yes"


@pytest.fixture(scope="module")
def table(pytestconfig):
    """Rows of the Markdown table, printed at the end."""
    rows = {}
    yield rows
    if rows:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows.values()]
        with pytestconfig.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print("\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_works_or_is_refused_in_one_line(name, small, table, command, tmp_path):
    folder, (kind, _, implementation, refused) = small(name), ARCHITECTURES[name]
    model = (f"model.name_or_path={folder}", f"model.attn_implementation={implementation}")
    row = table[name] = [name, f"`{kind}`"]
    if implementation == "eager":
        row[1] += ", eager"
    if refused is not None:
        ended = command(train.main, *TINY, *model, f"hydra.run.dir={tmp_path / 'run'}")
        assert ended.status == 2
        line = next(part for part in ended.err.splitlines() if part.startswith("error: "))
        assert line.startswith("error: model.name_or_path=")
        assert refused in line
        told = line.removeprefix(f"error: model.name_or_path={folder}: ").partition(";")[0]
        row += [f"refused: {told}", *[""] * (len(COLUMNS) - 3)]
        return
    policy = build(folder, name)
    config = policy.model.config
    shared = "once" if policy.shares_prefixes else "per row"
    row += ["states, per row" if is_recurrent(config) else shared, agrees(policy, folder, name)]
    for critic in CRITICS:
        run = tmp_path / critic
        chosen = [f"critic={critic}", f"hydra.run.dir={run}"]
        if critic == "lora" and not any("q_proj" in n for n, _ in policy.named_modules()):
            # peft leaves the other layers of Mamba 2 out
            layers = "[in_proj]" if kind == "mamba2" else "all-linear"
            chosen.append(f"critic.lora.target_modules={layers}")
        ended = command(train.main, *TINY, *model, *chosen)
        assert ended.status == 0, ended.err
        assert json.loads((run / "summary.json").read_text())["status"] == "finished"
        row.append("yes")
    last = tmp_path / "frozen_trunk" / "checkpoints" / "last.ckpt"
    ended = command(train.main, f"ckpt_path={last}", "trainer.max_epochs=2")
    assert ended.status == 0, ended.err
    assert json.loads((last.parents[1] / "summary.json").read_text())["iterations"] == 2
    row += ["yes", exported(command, last.parents[1], tmp_path / "out")]
