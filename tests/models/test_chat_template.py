"""Chat prompts of several turns: messages, sampled tokens of earlier turns, faulty templates."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from etpo.environments.conversation import Conversation
from etpo.errors import ConfigError
from etpo.models.chat_template import ChatTemplate
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate, Turn
from etpo.rollout.collector import collect
from etpo.rollout.datamodule import RolloutDataModule

from ..conftest import CHAT_TEMPLATE

START = "<|im_start|>"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def observation(instruction, *messages):
    return {"instruction": instruction, "prefix": "", "suffix": "", "messages": messages}


@pytest.fixture
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint("qwen-instruct"))


def shown(tokenizer, template, *arguments, max_tokens=1000):
    prompt = template.encode(tokenizer, observation(*arguments), max_tokens)
    return tokenizer.decode(prompt.ids).replace("<|im_end|>\n", "").split(START)[1:], prompt


def test_earlier_turns_are_messages_and_the_system_message_is_the_first(tokenizer):
    turns = user("one"), assistant("1")
    expected = ["system\nBe brief.", "user\none", "assistant\n1", "user\ntwo", "assistant\n"]
    assert shown(tokenizer, ChatTemplate(), "two", *turns)[0] == expected[1:]
    assert shown(tokenizer, ChatTemplate("Be brief."), "two", *turns)[0] == expected
    own = {"role": "system", "content": "Count."}
    expected[0] = "system\nBe brief.\n\nCount."
    assert shown(tokenizer, ChatTemplate("Be brief."), "two", own, *turns)[0] == expected


def test_a_prompt_that_is_too_long_loses_its_oldest_turns_then_words(tokenizer):
    turns = [user("one"), assistant("1"), user("two"), assistant("2")]
    template = ChatTemplate("Be brief.")
    whole = len(shown(tokenizer, template, "three", *turns)[1].ids)
    left, prompt = shown(tokenizer, template, "three", *turns, max_tokens=whole - 1)
    assert left == ["system\nBe brief.", "user\ntwo", "assistant\n2", "user\nthree", "assistant\n"]
    assert (prompt.dropped, len(prompt.ids)) == (whole - len(prompt.ids), whole - prompt.dropped)
    alone, prompt = shown(tokenizer, template, "three", max_tokens=1000)
    left, _ = shown(tokenizer, template, "three", *turns, max_tokens=len(prompt.ids))
    assert left == alone
    left, cut = shown(tokenizer, template, "three", *turns, max_tokens=len(prompt.ids) - 2)
    assert left[-2] == "user\nree"
    assert cut.dropped == whole - len(prompt.ids) + 2


MISTRAL = (  # the system message stands in the last user turn
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}: {% endif %}{{ m.content }}]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
FAULTY = {
    "{{ messages[0].content | upper }}|": "rewrites earlier turns",
    "{{ messages[-1].content }}|": "rewrites earlier turns",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}|{% endfor %}": "rewrites",
    "{% for m in messages %}{{ loop.revindex }}. {{ m.content }}|{% endfor %}": "rewrites",
    "{% for m in messages %}{{ m.content }}|{% endfor %}{{ messages[0].content }}": "rewrites",
    "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    "{{ messages[0].content }}": r"rejects earlier turns \(one turn\)",
}


@pytest.mark.parametrize(("template", "fault"), FAULTY.items())
def test_a_template_that_cannot_show_earlier_turns_is_refused_at_once(tokenizer, template, fault):
    tokenizer.chat_template = template
    chat = ChatTemplate()
    chat.encode(tokenizer, {"instruction": "hi", "prefix": "", "suffix": ""}, 100)  # one turn
    allowed = r"; allowed are observations without earlier turns \(environment.examples=0 "
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"chat template of .* {fault}.*{allowed}"):
            chat.check_conversations(tokenizer)
    with pytest.raises(ConfigError, match=fault):
        chat.encode(tokenizer, observation("hi", user("a"), assistant("b")), 100)


def test_a_template_that_moves_the_system_message_is_refused_with_one_only(tokenizer):
    tokenizer.chat_template = MISTRAL
    ChatTemplate().check_conversations(tokenizer)
    with pytest.raises(ConfigError, match=r"if there is a system .* model\.prompt\.system=null"):
        ChatTemplate("Be brief.").check_conversations(tokenizer)


def test_the_generation_prompt_may_differ_from_the_turn_that_it_becomes(tokenizer):
    """As in templates that open or close a thought; a note to the user is part of the turn."""
    turn = "{% for m in messages %}<{{ m.role }}>X{{ m.content }}Y;{% endfor %}"
    turn = turn.replace("X", "{% if m.role == 'assistant' %}<think></think>{% endif %}")
    start = "{% if add_generation_prompt %}<assistant><think>\n{% else %}</s>{% endif %}"
    tokenizer.chat_template = turn.replace("Y", "") + start
    ChatTemplate("Be brief.").check_conversations(tokenizer)
    tokenizer.chat_template = turn.replace("Y", "{% if loop.last %} /think{% endif %}") + start
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        ChatTemplate().check_conversations(tokenizer)


def test_templates_of_current_models(tokenizer):
    """TRL has the templates of many models; the first Gemma refuses a system message."""
    trl = pytest.importorskip("trl")
    found = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    assert len(found) > 40
    for file in found:
        tokenizer.chat_template = file.read_text()
        for system in (None, "Be brief."):
            template = ChatTemplate(system)
            if system and file.stem in ("gemma", "gemma_training"):
                with pytest.raises(ConfigError, match="rejects a system message"):
                    template.check_conversations(tokenizer)
                continue
            first = {"instruction": "a+b", "prefix": "", "suffix": ""}
            prompt = template.encode(tokenizer, first, 10**5)
            action = [*ids(tokenizer, "thus</think>11"), tokenizer.eos_token_id]
            turn = Turn(first, prompt.ids, "", action, "thus</think>11")
            second = observation("c+d", user("a+b"), assistant("thus</think>11"))
            longer = template.extend(tokenizer, second, turn, action[-1:], 10**5)
            assert longer.ids[: len(prompt.ids) + len(action) - 1] == prompt.ids + action[:-1]
            shown = tokenizer.decode(longer.ids)
            assert [shown.count(text) for text in ("a+b", "thus</think>11", "c+d")] == [1, 1, 1]
            assert system is None or shown.count(system) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}|{% endfor %}",
        "{% for m in messages if m.role != 'system' %}{{ m.content }}|{% endfor %}",
    ],
)
def test_a_template_without_a_system_message_is_refused_with_one_only(tokenizer, template):
    tokenizer.chat_template = template
    assert ChatTemplate().encode(tokenizer, observation("hi"), 100).ids
    with pytest.raises(ConfigError, match=r"model\.prompt\.system: .*; allowed is null"):
        ChatTemplate("Be brief.").encode(tokenizer, observation("hi"), 100)


def test_a_template_that_writes_bos_twice_is_refused(tokenizer):
    tokenizer.chat_template = "<s>{{ bos_token }}{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="begins a prompt with two BOS tokens"):
        ChatTemplate().encode(tokenizer, observation("hi"), 100)


def test_roles_that_a_template_rejects_are_named(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.content }}|{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"rejects the roles user, user \(Roles must alternate"):
        ChatTemplate().encode(tokenizer, observation("hi", user("a")), 100)


def test_a_system_message_is_a_text():
    with pytest.raises(ConfigError, match=r"model\.prompt\.system=3: allowed are a text and null"):
        ChatTemplate(3)


def extended(tokenizer, action, text, *, chat_template=CHAT_TEMPLATE, stops=("<|im_end|>",)):
    """The tokens after the prompt of the first turn."""
    tokenizer.chat_template = chat_template
    first, template = observation("one"), ChatTemplate()
    del first["messages"]
    prompt = template.encode(tokenizer, first, 1000)
    turn = Turn(first, prompt.ids, "", action, text)
    second = observation("two", user("one"), assistant(text))
    stop_ids = tokenizer.convert_tokens_to_ids(list(stops))
    longer = template.extend(tokenizer, second, turn, stop_ids, 1000)
    assert longer.ids[: len(prompt.ids)] == prompt.ids
    return longer.ids[len(prompt.ids) :]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_action_keeps_its_tokens_and_its_end_of_turn(tokenizer):
    """Also an action cut at the length limit, or by another stop token or a stop string."""
    after = f"<|im_end|>\n{START}user\ntwo<|im_end|>\n{START}assistant\n"
    tokenizer.add_tokens("ab")
    spelled = ids(tokenizer, "a") + ids(tokenizer, "b")  # the tokenizer would write one token
    assert ids(tokenizer, "ab") != spelled
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    expected = spelled + ids(tokenizer, after)
    for action in (spelled, [*spelled, end], [*spelled, other], spelled + ids(tokenizer, "\n;")):
        stops = "<|im_end|>", "</s>"
        assert extended(tokenizer, action, "ab", stops=stops) == expected
    one = ids(tokenizer, "ab")  # a stop string that begins inside a token
    assert extended(tokenizer, one, "a") == ids(tokenizer, "a") + ids(tokenizer, after)


def test_blanks_that_the_template_writes_before_the_end_of_a_turn_are_left_out(tokenizer):
    template = "{% for m in messages %}{{ m.content }} </s>[INST]{% endfor %}"
    end = tokenizer.eos_token_id
    action = ids(tokenizer, "7")
    following = ids(tokenizer, "[INST]two </s>[INST]")
    for ended, before in (([*action, end], action), (action, [*action, *ids(tokenizer, " ")])):
        found = extended(tokenizer, ended, "7", chat_template=template, stops=("</s>",))
        assert found == [*before, end, *following]


def test_another_conversation_is_tokenized_as_a_whole(tokenizer):
    first = {"instruction": "one", "prefix": "", "suffix": ""}
    x = ids(tokenizer, "x")
    turn = Turn(first, [5, 6], "", x, "x")
    for second in (
        observation("two"),
        observation("two", user("one"), assistant("y")),
        observation("two", user("zero"), assistant("x")),
        observation("two", user("zero"), assistant("x"), user("one"), assistant("x")),
    ):
        assert ChatTemplate().extend(tokenizer, second, turn, [], 1000) is None
    second = observation("two", user("one"), assistant("x"))
    assert ChatTemplate().extend(tokenizer, second, turn, [], 1000).ids[:3] == [5, 6, *x]
    assert ChatTemplate().extend(tokenizer, second, turn, [], 10) is None  # too long


def rows_of(played):
    """Prompt and action of every row, without padding."""
    a = played.actions
    return [
        (a.prompt_ids[i][a.prompt_mask[i]].tolist(), a.action_ids[i][a.action_mask[i]].tolist())
        for i in range(len(a.prompt_ids))
    ]


@pytest.mark.parametrize("groups", [1, 2])
def test_every_prompt_of_an_episode_begins_with_the_last_prompt_and_the_sampled_tokens(
    checkpoint, letter_env, groups
):
    """A random model over bytes: hardly any action is valid Unicode."""
    policy = LanguageModelPolicy(
        str(checkpoint("qwen-instruct")), ChatTemplate("Say c."), stop_tokens="<|im_end|>"
    )
    environment = Conversation(letter_env(4, length=3), history="all")
    draws = torch.Generator().manual_seed(0)
    played = collect(policy, environment, 5, 8, draws, seed=0, pipeline_groups=groups)
    rows, steps = rows_of(played), played.actions.step.tolist()
    (newline,) = ids(policy.tokenizer, "\n")
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in range(4, len(rows)):
        prompt, action = rows[row - 4]
        text = [i for i in action if i not in policy.stop_ids]
        if steps[row] > 0:
            beginning = [*prompt, *text, end, newline]
            assert rows[row][0][: len(beginning)] == beginning
        else:
            assert len(rows[row][0]) < len(prompt)
    following = played.bootstrap.prompt_ids[0][played.bootstrap.prompt_mask[0]].tolist()
    prompt, action = rows[-4]
    text = [i for i in action if i not in policy.stop_ids]
    assert following[: len(prompt) + len(text)] == prompt + text
    assert steps[-4:] == [1] * 4


def test_a_completion_keeps_the_sampled_tokens_and_its_stop_string(checkpoint, letter_env):
    policy = LanguageModelPolicy(
        str(checkpoint("llama")), CompletionTemplate(), stop_strings=["\n", "Q"]
    )
    texts = {"turn_format": r"{question}{answer}\n", "history": "all"}
    environment = Conversation(letter_env(40, length=3), **texts)
    played = collect(policy, environment, 3, 8, torch.Generator().manual_seed(0), seed=0)
    rows, (newline,) = rows_of(played), ids(policy.tokenizer, "\n")
    endings = set()
    for row in range(40, len(rows)):
        prompt, action = rows[row - 40]
        if action[-1] in (policy.tokenizer.eos_token_id, *ids(policy.tokenizer, "Q\n")):
            endings.add(action.pop())
        assert rows[row][0][: len(prompt) + len(action) + 1] == [*prompt, *action, newline]
        assert played.records[row].prompt.endswith("go" + played.records[row - 40].action[:2])
    assert len(endings) == 3


def test_a_run_checks_the_template_before_it_samples(checkpoint, letter_env, monkeypatch):
    """Worked examples and history need earlier turns; a run without them does not."""

    class Attached(RolloutDataModule):
        algorithm = attached_trainer = None

    policy = LanguageModelPolicy(str(checkpoint("qwen-instruct")), ChatTemplate())
    policy.tokenizer.chat_template = "{{ messages[-1].content }}|"
    for environment, refused in (
        (letter_env(2), False),
        (Conversation(letter_env(2), answer="last_line"), False),
        (Conversation(letter_env(2), history=1), True),
    ):
        data = Attached(environment, actions_per_iteration=4, minibatch_size=2)
        Attached.attached_trainer = type(
            "T", (), {"world_size": 1, "accumulate_grad_batches": 1, "precision": "32-true"}
        )
        Attached.algorithm = type("A", (), {"policy": policy})
        if refused:
            with pytest.raises(ConfigError, match="rewrites earlier turns"):
                data.setup("fit")
        else:
            data.setup("fit")
