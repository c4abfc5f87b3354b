"""Examples of `etpo-sft`: forms of a line, the best actions, programs, batches."""

import json
import sys

import pytest

from etpo.config import tiny_checkpoint
from etpo.errors import ConfigError
from etpo.models.chat_template import ChatTemplate
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.sft_data import Example, best_actions, programs, read_examples
from etpo.sft_module import Answer, ExampleBatches, encode, held_out
from tiny_lm import grammar

OPTIONS = {
    "seed": 0,
    "num_programs": 1,
    "mistake_rate": 0.0,
    "top_share": 1.0,
    "min_return": None,
}


def observation(text):
    return {"instruction": text, "prefix": text, "suffix": ""}


def write(file, *lines):
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text("".join(f"{text}\n" for text in texts))
    return file


def test_forms_of_a_line(tmp_path):
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    reply, again = {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}
    last = {"role": "assistant", "content": "b"}
    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "p", "answer": "a"},
        "",
        {"instruction": "i", "prefix": "x", "suffix": "y", "answer": "b"},
        {"instruction": "i", "messages": [user, reply], "answer": "c"},
        {"messages": [system, user, reply, again, last]},
    )
    found = read_examples(str(file), chat=True, **OPTIONS)
    one = {"instruction": "i", "prefix": "", "suffix": ""}
    assert found == [
        [Example(observation("p"), "a", f"{file}:1")],
        [Example({"instruction": "i", "prefix": "x", "suffix": "y"}, "b", f"{file}:3")],
        [Example({**one, "messages": (user, reply)}, "c", f"{file}:4")],
        [
            Example({**one, "instruction": "u", "messages": (system,)}, "a", f"{file}:5"),
            Example(
                {**one, "instruction": "v", "messages": (system, user, reply)}, "b", f"{file}:5"
            ),
        ],
    ]


def test_later_turns_continue_the_tokens_of_earlier_ones(checkpoint, tmp_path):
    turns = [("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    messages = [{"role": role, "content": text} for role, text in turns]
    file = write(tmp_path / "a.jsonl", {"messages": messages})
    policy = LanguageModelPolicy(
        str(checkpoint("smollm2")), ChatTemplate(), stop_tokens=["<|im_end|>"]
    )
    found = read_examples(str(file), chat=True, **OPTIONS)
    (one, two), _ = encode(policy, found, 10)
    assert two.prompt_ids[: len(one.prompt_ids) + 1] == (*one.prompt_ids, one.action_ids[0])
    shown = policy.tokenizer.apply_chat_template(
        messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(two.prompt_ids) == shown


def lines_of(*values):
    """Lines of `episodes.jsonl`: (env, attempt, action, reward, observation)."""
    return [
        (
            f"f:{number + 1}",
            {
                **{"iteration": 0, "env": env, "attempt": attempt, "action": action},
                **{"reward": reward, "observation": observation(text)},
            },
        )
        for number, (env, attempt, action, reward, text) in enumerate(values)
    ]


def test_best_actions_by_the_return_of_their_episodes():
    lines = lines_of(
        (0, 1, "first", 0.0, "q"),
        (1, 1, "other", 0.25, "q"),
        (0, 2, "second", 1.0, "r"),
        (1, 1, "third", 0.5, "q"),
        (0, 1, "third", -1.0, "q"),
        (0, 2, "cut", 2.0, "r"),
    )
    lines[-1][1]["length_limited"] = True

    def best(share, least=None):
        found = best_actions(lines, share, least)
        return {(e.observation["prefix"], e.answer, e.place) for e in found}

    first, third, second = ("q", "first", "f:1"), ("q", "third", "f:5"), ("r", "second", "f:3")
    assert best(1.0) == {first, third, second, ("q", "other", "f:2")}
    assert best(0.34) == {first, third, second}
    assert best(0.33) & {first, third} in ({first}, {third})
    assert best(1.0, 0.5) == {first, third, second}
    with pytest.raises(ConfigError, match=r"^data.min_return=3: none of 6 actions"):
        best(1.0, 3)


def test_episodes_of_a_run_are_encoded_as_they_were_sampled(finished_run, tmp_path):
    file = finished_run.folder / "episodes.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    found = read_examples(str(file), chat=False, **OPTIONS)
    policy = LanguageModelPolicy(tiny_checkpoint(), CompletionTemplate())
    (answers, left_out) = encode(policy, found, 100)
    assert (len(answers), left_out) == (len(found), 0)
    ended = [record for record in records if not record["length_limited"]]
    shown = [(policy.tokenizer.decode(prompt), policy.decode(action)) for prompt, action in answers]
    assert {prompt for prompt, _ in shown} == {record["prompt"] for record in ended}
    joined = {record["observation"]["prefix"] + record["action"] for record in ended}
    assert {prompt + action for prompt, action in shown} == joined


def test_programs_of_the_grammar():
    found = programs(18, 0.0, 0, fenced=False)
    assert all(grammar.parse(example.answer).error() is None for example in found)
    assert ["failed" in example.observation["prefix"] for example in found] == [
        *[False] * 8, True, *[False] * 8, True,
    ]  # fmt: skip
    assert len({example.observation["prefix"] for example in found}) == 4
    fenced = programs(18, 0.0, 0, fenced=True)
    text = f"```python\ndef build_model(x_train, y_train):\n{found[0].answer}```"
    assert fenced[0].answer == text
    assert programs(18, 0.0, 1, fenced=False) != found


def test_programs_need_the_repository(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiny_lm", None)
    with pytest.raises(ConfigError, match=r"^data.source=programs: needs the folder src/tiny_lm"):
        programs(1, 0.0, 0, fenced=False)


def rows(*prompts):
    return [Answer((ord(prompt),), (number,)) for number, prompt in enumerate(prompts)]


def test_whole_prompts_are_held_out():
    answers = rows(*"aabbccdd")
    found = held_out(answers, 0.25, 0)
    assert len(found) == 2
    assert len({answers[row].prompt_ids for row in found}) == 1
    assert found == held_out(answers, 0.25, 0)
    assert len({frozenset(held_out(answers, 0.25, seed)) for seed in range(9)}) > 1
    assert len(held_out(rows(*"aaaa"), 0.25, 0)) == 1
    assert held_out(answers, 0.0, 0) == held_out(rows("a"), 0.5, 0) == set()


def test_batches_keep_prompts_together_in_a_new_order():
    answers = rows(*"abcabcabc")
    batches = ExampleBatches(answers, 3, 0)
    assert len(batches) == 3
    first = list(batches)
    assert sorted(row for batch in first for row in batch) == list(range(9))
    assert all(len({answers[row].prompt_ids for row in batch}) == 1 for batch in first)
    assert list(batches) == first
    batches.epoch = 1
    assert list(batches) != first
