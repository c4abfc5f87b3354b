import pytest

from etpo_tasks.data_science.prompts import HEADER, program_from_action

BODY = "    model = fit(x_train)\n    return model\n"
WHOLE = HEADER + BODY


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        f" {WHOLE}",  # SentencePiece's first blank
        f"```python\n{WHOLE}```",
        f"``` python\n{WHOLE}\n```\n",
        f"```\n{WHOLE}",
        f"```Python3\n{WHOLE}```",
        f"```{{python}}\n{WHOLE}```",
        f"```{{.python .numberLines}}\n{WHOLE}```",
        f"````md\n{WHOLE}````",
        f"~~~\n{WHOLE}~~~~",
        f"~~~ py\n{WHOLE}",
        f" Here is `build_model`:\n\n```python\n{WHOLE}```\nUse it as\n```\nbuild_model(x, y)\n```",
        f"First:\n```sh\npip install scikit-learn\n```\nthen:\n```py\n{WHOLE}```",
        f"1. As asked:\n\t```python\n\t{WHOLE.replace(chr(10), chr(10) + chr(9))}```",
        f"{WHOLE}```\nIt fits the model.",
        f"```python\n{BODY}```",
        BODY,
        f"{BODY}```\nIt fits the model.\n",
        f"{BODY}```\n\n```python\nbuild_model(x, y)\n```",
    ],
)
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_the_program_of_an_answer(answer, line_break):
    program = program_from_action(answer.replace("\n", line_break))
    assert program.replace("\r\n", "\n").rstrip() == WHOLE.rstrip()


def test_fences_of_another_kind_do_not_end_a_block():
    text = f'{HEADER}    """\n~~~\n```x\n```\n    """\n    return 1\n'
    assert program_from_action(f"````python\n{text}````") == text


def test_a_text_without_a_fence_is_a_body_as_it_stands():
    assert program_from_action("x ``` y") == f"{HEADER}x ``` y"
    assert program_from_action("") == HEADER
