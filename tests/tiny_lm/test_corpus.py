"""The mixture of prompts that the tiny model is trained on."""

import random

from etpo_tasks.data_science.prompts import HEADER
from tiny_lm.corpus import sample_example
from tiny_lm.grammar import parse


def test_mixture_and_form_of_the_prompts():
    rng = random.Random(0)
    examples = [sample_example(rng) for _ in range(4000)]
    share = {kind: sum(e.kind == kind for e in examples) / 4000 for kind in ("first", "repair")}
    assert 0.57 < share["first"] < 0.63
    assert 0.22 < share["repair"] < 0.28
    marks = {"first": "# ", "repair": "# failed:\n", "improve": "# scores "}
    for example in examples:
        assert marks[example.kind] in example.prompt
        assert example.prompt.endswith("\n" + HEADER)
        assert example.action.startswith("    ")
    assert len({example.prompt.split(":")[0] for example in examples}) > 2000


def test_answers_are_programs_of_the_grammar():
    rng = random.Random(1)
    assert all(parse(sample_example(rng).action) is not None for _ in range(100))


def test_some_repairs_are_of_text_that_is_no_program():
    rng = random.Random(2)
    repairs = [e for e in (sample_example(rng) for _ in range(1000)) if e.kind == "repair"]
    malformed = 0
    for example in repairs:
        failed = example.prompt.split("# failed:\n" + HEADER)[1].rsplit("# repaired:\n", 1)[0]
        body = failed[: failed.rstrip("\n").rfind("\n# ") + 1]
        malformed += parse(body) is None
    assert 0.04 < malformed / len(repairs) < 0.2
