"""Prompts and actions with the tokenizers of real models.

`make tokenizers` fetches them; the environment variable ETPO_TOKENIZERS names their folder.
"""

import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from etpo.environments.conversation import Conversation
from etpo.generation import sampler
from etpo.models.chat_template import ChatTemplate
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate, InfillingTemplate, Turn
from etpo.models.stopping import completes_stop_string
from etpo.models.token_text import added_text, continued_ids
from etpo.rollout.collector import collect
from etpo_sandbox import Sandbox
from etpo_tasks.data_science import prompts
from etpo_tasks.data_science.env import DataScienceEnv
from etpo_tasks.sokoban import SokobanEnv

from ..by_token import any_token

NAMES = ("llama2", "llama3_1", "gemma3", "qwen3", "deepseek_v3", "gptoss", "smollm2")
CONTROL = ("<PRE>", "<SUF>", "<MID>")
CACHE = Path(os.environ.get("ETPO_TOKENIZERS", Path(__file__).parents[2] / ".cache/tokenizers"))

FIT = "LogisticRegression(max_iter=200).fit(x_train, y_train)"
BODY = f"    from sklearn.linear_model import LogisticRegression\n    return {FIT}\n"
WHOLE = prompts.HEADER + BODY
# bodies that a completion prompt is made for, then other beginnings that are right as well
BODIES = (
    BODY,
    BODY.replace("    ", "\t"),
    BODY.replace("\n", "\r\n"),
    f"    # naïve Bayes would be 60% as good: 正确\n{BODY}",
    f"    return __import__('sklearn.linear_model').linear_model.{FIT}",
)
OTHER_BODIES = (f"\n{BODY}", f"{BODY}```\nThis fits a logistic regression.\n")
ANSWERS = (
    WHOLE,
    f"import numpy as np\n\n{WHOLE}",
    f"```python\n{WHOLE}```",
    f"Here is the program:\r\n\r\n```python\r\n{WHOLE}```\r\nIt fits.".replace("\n", "\r\n"),
    f"~~~\n{WHOLE}~~~",
    f"```python3\n{WHOLE}\n```",
    f"```{{python}}\n{WHOLE}```",
    f'````python title="fit.py"\n{WHOLE}````',
    f"1. Install it:\n   ```sh\n   pip install scikit-learn\n   ```\n2. Fit:\n```py\n{WHOLE}```",
    f"  ```python\n  {WHOLE.replace(chr(10), chr(10) + '  ')}```",
    f"```\n{WHOLE}",
)
INSTRUCTIONS = (
    prompts.observation(prompts.Task("iris", 60, 4, 3))["instruction"],
    "Write",
    "  two blanks first, and a line break last\n",
    "\n\nÜber 正确 🙂\ttabs  and   blanks",
    "<b>A user's <|im_end|> text</b>",
)
OBSERVATION = prompts.observation(prompts.Task("iris", 60, 4, 3))


def folder_of(name: str) -> Path:
    folder = CACHE / name
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}: make tokenizers")
    return folder


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request):
    return AutoTokenizer.from_pretrained(folder_of(request.param))


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    """A tiny random model with this tokenizer and infilling tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.add_tokens(list(CONTROL), special_tokens=True)
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 5,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    return LanguageModelPolicy(str(folder), CompletionTemplate())


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spelled(tokenizer, prefix: str, action: str):
    """The prompt's ids, what it leaves to the action, and the action's ids in the joined text."""
    prompt = CompletionTemplate().encode(tokenizer, OBSERVATION | {"prefix": prefix}, 10**6)
    joined = tokenizer(prefix + action)["input_ids"]
    assert joined[: len(prompt.ids)] == prompt.ids
    return prompt, joined[len(prompt.ids) :]


@pytest.mark.parametrize("body", BODIES)
def test_tokens_of_prompt_and_program_are_those_of_the_joined_text(tokenizer, body):
    spelled(tokenizer, OBSERVATION["prefix"], body)


def sokoban_prefix():
    return SokobanEnv().reset(seed=0)[0]["prefix"]


@pytest.mark.parametrize(
    ("prefix", "action"),
    [
        (sokoban_prefix(), "left"),
        ("Q: 1 + 1\nA: ", "2"),
        ("Next: ", "open the fridge"),
        ("Next:  \t", "Put it down"),
        ("A board\n- X O\n", "[4]"),
        ("A board\n\n", "    indented"),
        ("He said:", " yes"),
    ],
)
def test_tokens_of_prompt_and_action_are_those_of_the_joined_text(tokenizer, prefix, action):
    prompt, ids = spelled(tokenizer, prefix, action)
    assert (prompt.rest + action) == "".join(token_pieces(tokenizer, ids))
    assert prefix.endswith(prompt.rest)


def token_pieces(tokenizer, ids):
    """The text of each token by the vocabulary, without the library's decoder."""
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token.startswith("<0x"):
            yield chr(int(token[3:-1], 16))
        else:
            yield token.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_a_chat_prompt_is_what_the_model_s_template_gives(tokenizer, text):
    if tokenizer.chat_template is None:
        pytest.skip("the tokenizer has no chat template")
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    template = ChatTemplate()
    assert template.encode(tokenizer, OBSERVATION | {"instruction": text}, 10**6).ids == expected


def test_a_chat_prompt_that_is_too_long_loses_its_oldest_words(tokenizer):
    if tokenizer.chat_template is None:
        pytest.skip("the tokenizer has no chat template")
    text = " ".join(f"word{i}" for i in range(100))
    limit = 150
    prompt = ChatTemplate().encode(tokenizer, OBSERVATION | {"instruction": text}, limit)
    shown = tokenizer.decode(prompt.ids)
    assert limit - 5 < len(prompt.ids) <= limit
    assert prompt.dropped > 0
    assert "word99" in shown
    assert "word0 " not in shown
    start = shown.index("word99") - 60
    kept = text[text.index(shown[start : start + 20]) :]
    assert kept in shown  # nothing is missing in the middle


def message(role, text):
    return {"role": role, "content": text}


def turn_after(tokenizer, template, first, action, text):
    """The first turn of a conversation, and its prompt."""
    prompt = template.encode(tokenizer, first, 10**6)
    return Turn(first, prompt.ids, prompt.rest, action, text), prompt.ids


SETTINGS = ({}, {"system": "Be brief."}, {"template_kwargs": {"enable_thinking": False}})


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "system", "no thinking"])
def test_a_template_continues_a_prompt_with_the_sampled_tokens(tokenizer, settings):
    """Its own tokens of two turns, if the action is spelled as it would spell it."""
    if tokenizer.chat_template is None:
        pytest.skip("the tokenizer has no chat template")
    if "enable_thinking" not in tokenizer.chat_template and "template_kwargs" in settings:
        pytest.skip("the template has no such variable")
    template, end = ChatTemplate(**settings), tokenizer.eos_token_id
    first = {"instruction": "What is 7+6?", "prefix": "", "suffix": ""}
    turns = message("user", first["instruction"]), message("assistant", "It is 13.")
    second = first | {"instruction": "And 2+2?", "messages": turns}
    whole = template.encode(tokenizer, second, 10**6).ids
    spelled, other = ids_of(tokenizer, "It is 13."), ids_of(tokenizer, "It is 1")
    other += ids_of(tokenizer, "It is 13.")[len(ids_of(tokenizer, "It is ")) :][-1:]
    for action in (spelled, [*spelled, end]):
        turn, before = turn_after(tokenizer, template, first, action, "It is 13.")
        found = template.extend(tokenizer, second, turn, [end], 10**6).ids
        assert found[: len(before) + len(spelled) + 1] == [*before, *spelled, end]
        if "template_kwargs" not in settings:
            assert found == whole
        else:  # Qwen3 shows the empty thinking block of the last turn only
            assert added_text(tokenizer, whole).count("<think>") == 1
            assert added_text(tokenizer, found).count("<think>") == 2
    letters = [i for c in "It is 13." for i in continued_ids(tokenizer, c)]
    thought = "<think>\nno\n</think>\n\n  It is 13.\n"
    for action, text in ((letters, "It is 13."), (ids_of(tokenizer, "x" + thought)[1:], thought)):
        later = second | {"messages": (turns[0], message("assistant", text))}
        turn, before = turn_after(tokenizer, template, first, [*action, end], text)
        found = template.extend(tokenizer, later, turn, [end], 10**6).ids
        assert found[: len(before) + len(action) + 1] == [*before, *action, end]
        shown = added_text(tokenizer, found[len(before) + len(action) :])
        assert whole[-5:] == found[-5:]
        assert "And 2+2?" in shown
    assert spelled != letters


@pytest.mark.parametrize("end", ["", "\n", "eos"])
def test_a_completion_continues_with_the_sampled_tokens(tokenizer, end):
    template, question = CompletionTemplate(), "2+2 = 4\n7+6 = "
    first = OBSERVATION | {"prefix": question}
    rest = template.encode(tokenizer, first, 10**6).rest
    action = [i for c in f"{rest}13" for i in continued_ids(tokenizer, c)]
    ending = [tokenizer.eos_token_id] if end == "eos" else continued_ids(tokenizer, end)
    turn, before = turn_after(tokenizer, template, first, [*action, *ending], "13")
    prefix = f"{question}13\n8+9 = "
    prompt = template.extend(tokenizer, first | {"prefix": prefix}, turn, [], 10**6)
    assert prompt.ids[: len(before) + len(action)] == [*before, *action]
    alone = template.encode(tokenizer, first | {"prefix": prefix}, 10**6)
    assert (tokenizer.decode(prompt.ids), prompt.rest) == (tokenizer.decode(alone.ids), alone.rest)
    if not rest:
        return
    # without the blank that the prompt leaves to the action, the action is tokenized anew
    turn, before = turn_after(tokenizer, template, first, continued_ids(tokenizer, "13"), "13")
    prompt = template.extend(tokenizer, first | {"prefix": prefix}, turn, [], 10**6)
    assert tokenizer.decode(prompt.ids) == tokenizer.decode(alone.ids)


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_every_prompt_begins_with_the_last_prompt_and_the_sampled_tokens(
    policy, form, letter_env, monkeypatch
):
    """Random tokens: parts of characters, control tokens, hardly any as a text would be split."""

    class Asking(letter_env):
        """Its prefix never ends with a blank, which a prompt would leave to the action."""

        def step_part(self, actions, envs):
            following, *results = super().step_part(actions, envs)
            return [o | {"prefix": "go"} for o in following], *results

    template = {"completion": CompletionTemplate(), "chat": ChatTemplate()}[form]
    if form == "chat" and policy.tokenizer.chat_template is None:
        pytest.skip("the tokenizer has no chat template")
    monkeypatch.setattr(policy, "prompt", template)
    environment = Conversation(Asking(4), history="all", turn_format=r"{question}{answer}\n")
    played = collect(policy, environment, 3, 8, torch.Generator().manual_seed(0), seed=0)
    actions = played.actions
    for row in range(4, 12):
        last = row - 4
        spoken = actions.action_ids[last][actions.action_mask[last]].tolist()
        spoken = [i for i in spoken if i not in policy.stop_ids]
        before = actions.prompt_ids[last][actions.prompt_mask[last]].tolist()
        prompt = actions.prompt_ids[row][actions.prompt_mask[row]].tolist()
        assert prompt[: len(before) + len(spoken)] == before + spoken
        assert len(prompt) > len(before) + len(spoken)


@pytest.mark.parametrize("stop", ["\ndef ", "\n", "END", "正", "é 正", "</answer>"])
def test_a_stop_string_ends_an_action_with_the_token_that_completes_it(policy, stop, monkeypatch):
    monkeypatch.setattr(policy, "stop_strings", [stop])
    text = f"x = é 1{stop}y{stop}"
    ids = ids_of(policy.tokenizer, f"a {text}")[len(ids_of(policy.tokenizer, "a")) :]
    ends = (
        n
        for n in range(1, len(ids) + 1)
        if completes_stop_string(policy.tokenizer, policy.stop_strings, ids[:n])
    )
    ended = next(ends)
    assert policy.decode(ids[:ended]) == " x = é 1"
    assert stop not in policy.decode(ids[: ended - 1])


@pytest.mark.parametrize("text", [prompts.SUFFIX, "x = 1", " x", "\tx", "正 é"])
def test_a_text_that_continues_another_gets_no_blank_in_front(tokenizer, text):
    assert added_text(tokenizer, continued_ids(tokenizer, text)) == text


def test_tokens_that_end_no_action_stay_in_its_text(policy):
    word, middle = ids_of(policy.tokenizer, "x"), policy.tokenizer.get_vocab()["<MID>"]
    ids = [*word, middle, *word, policy.tokenizer.eos_token_id]
    assert policy.decode(ids).replace(" ", "") == "x<MID>x"


@pytest.fixture(scope="module")
def environment():
    copies = len(BODIES) + len(OTHER_BODIES) + len(ANSWERS)
    with Sandbox(workers=2) as sandbox:
        yield DataScienceEnv(dataset="iris", sandbox=sandbox, num_envs=copies, n_splits=1)


@pytest.mark.parametrize("form", ["completion", "infilling", "chat"])
def test_a_right_program_that_is_sampled_is_scored_as_right(policy, environment, form, monkeypatch):
    template = {
        "completion": CompletionTemplate(),
        "infilling": InfillingTemplate(*CONTROL),
        "chat": ChatTemplate(),
    }[form]
    tokenizer = policy.tokenizer
    if form == "chat" and tokenizer.chat_template is None:
        pytest.skip("the tokenizer has no chat template")
    monkeypatch.setattr(policy, "prompt", template)
    observations, _ = environment.reset()
    actions = [
        spelled(tokenizer, observations[0]["prefix"], text)[1]
        if form == "completion" and text in BODIES
        else ids_of(tokenizer, f"\u2423{text}")[len(ids_of(tokenizer, "\u2423")) :]
        for text in (*BODIES, *OTHER_BODIES, *ANSWERS)
    ]
    ids = torch.full((len(actions), max(map(len, actions)) + 1), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, action in enumerate(actions):
        ids[row, : len(action)] = torch.tensor(action)
        mask[row, : len(action) + 1] = True
    sets = any_token(*ids.shape)
    taken = sampler.Sample(ids, mask, mask, mask[..., None].float(), sets, sets, ~mask.any(1))
    texts = sampler.decode_actions(policy, policy.encode(observations), taken)
    _, rewards, _, _, infos = environment.step(texts)
    assert [e for e in infos["error"] if e is not None] == []
    assert rewards.min() > 0.9


SPACES = {
    "Next: ": ("go to the kitchen", "go to the garden", "open the fridge", "open it", "look", ""),
    "Move:": (" [4]", " [14]", " up!", "\n", " naïve 正确 🙂"),
}


@torch.no_grad()
@pytest.mark.parametrize("prefix", SPACES)
@pytest.mark.parametrize("form", ["completion", "chat"])
def test_choices_are_spelled_and_sampled(policy, form, prefix, monkeypatch):
    tokenizer, choices = policy.tokenizer, SPACES[prefix]
    if form == "chat" and tokenizer.chat_template is None:
        pytest.skip("the tokenizer has no chat template")
    template = CompletionTemplate() if form == "completion" else ChatTemplate()
    monkeypatch.setattr(policy, "prompt", template)
    observation = {"instruction": prefix, "prefix": prefix, "suffix": "", "choices": choices}
    taken_prompts = policy.encode([observation] * 60)
    generator = torch.Generator().manual_seed(0)
    taken = sampler.generate(policy, taken_prompts, 24, generator)
    texts = sampler.decode_actions(policy, taken_prompts, taken)
    assert set(texts) == set(choices)
    assert not taken.length_limited.any()
    if form == "completion":  # the tokens of the joined text, before the end token
        for ids, mask, text in zip(taken.ids, taken.mask, texts, strict=True):
            if text.strip(" \n"):
                assert ids[mask][:-1].tolist() == spelled(tokenizer, prefix, text)[1]


@torch.no_grad()
def test_a_grammar_is_over_the_tokens_of_the_model(policy):
    """Of one or several characters, and parts of characters."""
    pattern = "(go|open) the (kitchen|door)|naïve 正确 [0-9]{1,4}"
    prompt = policy.encode([{"instruction": "", "prefix": "Next:", "suffix": ""}] * 60)
    generator = torch.Generator().manual_seed(0)
    taken = sampler.generate(policy, prompt, 40, generator, {"regex": pattern})
    texts = sampler.decode_actions(policy, prompt, taken)
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert {text[0] for text in texts} >= {"g", "o", "n"}
    assert (taken.step_mask.sum(1) < taken.mask.sum(1)).any()
