"""States and gradients of a tree against ordinary forwards of each row by transformers alone."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModel

from etpo.models import tree_forward
from etpo.models.causal_lm import trunk_of
from etpo.models.critics import TrunkCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prefix_tree import prefix_tree
from etpo.models.prompting import CompletionTemplate
from etpo.models.tree_forward import checkpoint_layers, forward_tree

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 5}  # shorter than the rows
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS = {
    "rotary positions": ("llama", {}),
    "grouped queries": ("llama", {"num_key_value_heads": 2}),
    "learned positions": ("gpt2", {}),
    "learned positions with an offset": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "sliding window": ("mistral", WINDOW | {"num_key_value_heads": 1}),
    "windows in some layers": ("gemma3_text", WINDOW | LAYERS | {"head_dim": 6}),
}
LIMITS = {100: 1, 12: 2, 2: 4}  # tokens of a packed row, and the stages of the tree of `rows`


def model_of(name):
    """Return a random trunk in float64; normalizations of the library round to float32."""
    kind, changes = MODELS[name]
    config = AutoConfig.for_model(kind, **SIZES | changes)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="sdpa").double().eval()
    for path, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__:
            exact = torch.nn.RMSNorm(module.weight.shape, eps=1e-6, dtype=torch.float64)
            model.set_submodule(path, exact)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def rows(seed=0):
    """Return prompts and actions that branch at different depths, some of one length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(3, 40, shape, generator=generator).tolist()

    stem, other = draw(6), draw(3)
    prompts = [stem, stem, [*stem, *draw(2)], [*stem[:4], *draw(3)], other, stem, other, draw(1)]
    actions = [draw(5) for _ in prompts]
    actions[1] = [*actions[0][:2], *draw(4)]
    actions[5] = [*actions[1][:3], *draw(2)]
    actions[6] = [*actions[4][:4], *draw(1)]  # another last token, which is not read
    actions[7] = draw(1)
    return list(zip(prompts, actions, strict=True))


def tree_of(pairs, limit=256):
    prompts, actions = ([torch.tensor(each) for each in side] for side in zip(*pairs, strict=True))
    pad = torch.nn.utils.rnn.pad_sequence
    sides = []
    for side, padding_side in ((prompts, "left"), (actions, "right")):
        padded = pad(side, batch_first=True, padding_value=-1, padding_side=padding_side)
        sides += [padded.clamp(min=0), padded >= 0]
    return prefix_tree(*sides, limit=limit)


def plain_states(model, pairs):
    """Return the states [l, D] before each token of each action."""
    return [
        model(input_ids=torch.tensor([[*prompt, *action[:-1]]]), use_cache=False).last_hidden_state[
            0, len(prompt) - 1 :
        ]
        for prompt, action in pairs
    ]


def gradients(model, states):
    """Return gradients of a random linear loss of the states of all tokens."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (torch.randn(each.shape, generator=generator, dtype=each.dtype) * each).sum()
        for each in states
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, trained.values(), allow_unused=True)
    return dict(zip(trained, found, strict=True))


def by_row(tree, states):
    return [row[mask] for row, mask in zip(tree.of_tokens(states), tree.mask, strict=True)]


def adapted(model):
    """Add a random adapter, which alone is trained."""
    targets = r".*(q_proj|v_proj|down_proj|c_attn|fc1)"
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.double(), std=0.5)
            parameter.data = parameter.data.double()
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("form", ["all weights", "checkpointed", "adapter", "checkpointed adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_are_those_of_separate_rows(name, form):
    model, pairs = model_of(name), rows()
    if "adapter" in form:
        model = adapted(model)
    expected = plain_states(model, pairs)
    exact = gradients(model, expected)
    assert any(g is not None and g.abs().max() > 1e-2 for g in exact.values())
    assert ("adapter" in form) == all("lora_" in parameter for parameter in exact)
    if "checkpointed" in form:
        assert checkpoint_layers(model)
    for limit, stages in LIMITS.items():
        tree = tree_of(pairs, limit)
        assert len(tree.nodes.stages) == stages
        for packed in (True, False) if stages == 1 else (True,):
            states = by_row(tree, forward_tree(model, tree, packed))
            found = gradients(model, states)
            for one, other in zip(states, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            for parameter, gradient in exact.items():
                torch.testing.assert_close(found[parameter], gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["grouped queries", "windows in some layers"])
@pytest.mark.parametrize("seed", range(1, 6))
def test_random_trees(name, seed):
    model, generator = model_of(name), torch.Generator().manual_seed(seed)
    few = torch.randint(3, 5, (14, 20), generator=generator).tolist()  # two tokens: many branches
    sizes = torch.randint(1, 10, (14, 2), generator=generator).tolist()
    pairs = [(row[:p], row[p : p + a]) for row, (p, a) in zip(few, sizes, strict=True)]
    expected = plain_states(model, pairs)
    exact = gradients(model, expected)
    numbers = set()
    for limit in (1, 3, 7, 200):
        tree = tree_of(pairs, limit)
        numbers.add(len(tree.nodes.stages))
        states = by_row(tree, forward_tree(model, tree))
        found = gradients(model, states)
        for one, other in zip(states, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        for parameter, gradient in exact.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-8, atol=1e-8)
    assert len(numbers) > 2


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_forwards_without_gradient_are_split_by_their_tokens(packed, monkeypatch):
    model, tree, sizes = model_of("sliding window"), tree_of(rows(), limit=4), []
    expected = forward_tree(model, tree, packed)

    def record(_, args, given):
        total = given["input_ids"].numel()
        if packed:
            total = given["attention_mask"][:, 0, 0].numel()  # with the context
        sizes.append((len(given["input_ids"]), total))

    model.register_forward_pre_hook(record, with_kwargs=True)
    forward_tree(model, tree, packed)
    assert len(sizes) == (len(tree.nodes.stages) if packed else 1)
    whole = len(sizes)
    sizes.clear()
    monkeypatch.setattr(tree_forward, "FORWARD_TOKENS", 25)
    torch.testing.assert_close(forward_tree(model, tree, packed), expected, rtol=0, atol=1e-12)
    assert len(sizes) > whole
    assert any(count > 1 for count, _ in sizes)
    assert all(total <= 25 for _, total in sizes)


def test_each_distinct_token_is_read_once(checkpoint):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    assert policy.packs_prefixes
    tree, shapes = tree_of(rows()), []
    trunk_of(policy.model).register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    policy.hidden_states(tree)
    assert shapes == [(1, len(tree.nodes.token))]
    read = sum(len(prompt) + len(action) - 1 for prompt, action in rows())
    assert len(tree.nodes.token) < 0.8 * read


@pytest.mark.parametrize("family", ["llama", "qwen", "starcoder"])
def test_log_probs_and_gradients_are_those_of_whole_sequences(checkpoint, family):
    policy = LanguageModelPolicy(str(checkpoint(family)), CompletionTemplate())
    pairs, size = rows(), policy.vocabulary_size
    model = policy.model
    expected = [
        model(torch.tensor([[*prompt, *action[:-1]]]))
        .logits[0, len(prompt) - 1 :, :size]
        .log_softmax(-1)
        for prompt, action in pairs
    ]
    exact = gradients(model, expected)
    for limit in LIMITS:
        tree = tree_of(pairs, limit)
        log_probs = by_row(tree, policy.log_probs(policy.hidden_states(tree)).log_probs)
        for one, other in zip(log_probs, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        for name, gradient in gradients(model, log_probs).items():
            torch.testing.assert_close(gradient, exact[name], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_and_half_precision(checkpoint, dtype):
    """The mask has the type of the scores."""
    policy = LanguageModelPolicy(str(checkpoint("qwen")), CompletionTemplate(), dtype=dtype)
    one, other = (tree_of(rows(), limit) for limit in (200, 4))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
        states = [policy.hidden_states(tree).float() for tree in (one, other)]
    torch.testing.assert_close(*states, rtol=0.1, atol=0.1)
    assert states[0].isfinite().all()


def test_the_trunk_critic_reads_whole_sequences(checkpoint):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    critic = TrunkCritic(policy, hidden_size=16)
    for layer in (critic.head.value, critic.head.advantage):
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2))
    pairs = rows()
    tree = tree_of(pairs, limit=12)
    unused = torch.zeros(len(tree.node), policy.hidden_size)
    outputs = critic(tree, unused, unused)
    expected = [critic.head(states) for states in plain_states(critic.trunk, pairs)]
    for one, other in zip(outputs, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(
            tree.of_tokens(one)[tree.mask], torch.cat(other), rtol=1e-3, atol=1e-4
        )
