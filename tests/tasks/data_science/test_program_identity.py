import random

import pytest

from etpo_tasks.data_science.program_identity import canonical_form
from tiny_lm import grammar

PROGRAMS = [grammar.sample(random.Random(seed), mistake_rate=0.0) for seed in range(300)]


def body(text):
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    return "def build_model(x_train, y_train):\n" + lines


def test_programs_of_one_form_are_those_that_differ_in_the_variable():
    texts = {}
    for program in PROGRAMS:
        forms = set()
        for variable in ("model", "clf", "a_rather_long_name"):
            renamed = program._replace(variable=variable)
            forms.add(canonical_form(body(renamed.render())))
        assert len(forms) == 1
        texts.setdefault(forms.pop(), set()).add(program._replace(variable="model").render())
    assert all(len(rendered) == 1 for rendered in texts.values())
    assert len(texts) > 100


def test_comments_and_blanks_make_no_other_form():
    plain = "x = f(1,\n  2)\nreturn x"
    spaced = "# first\n\ny = f( 1,2 )  # second\n\nreturn   y"
    assert canonical_form(body(plain)) == canonical_form(body(spaced))
    assert canonical_form("if a:\n  b()") == canonical_form("if a:\n     b()\n\n")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("a = 1\nb = 2\nreturn a", "a = 1\nb = 2\nreturn b", id="the variable meant"),
        pytest.param("a = 1\nb = 2\nreturn f(a, b)", "a = 1\na = 2\nreturn f(a, a)", id="merged"),
        pytest.param("a = 1\nreturn x.a", "b = 1\nreturn x.b", id="attribute"),
        pytest.param("a = 1\nreturn f(a=a)", "b = 1\nreturn f(b=b)", id="keyword argument"),
        pytest.param("return f(\n  a=1)", "return f(\n  b=1)", id="keyword on its own line"),
        pytest.param("from m import a\na = a()", "from m import b\nb = b()", id="import"),
        pytest.param("if x: import a\na = a()", "if x: import b\nb = b()", id="import after :"),
        pytest.param("from m import *\na = f(a)", "from m import *\nb = f(b)", id="import all"),
        pytest.param("max = max(x)", "min = min(x)", id="builtin"),
        pytest.param("None = 1\nreturn None", "a = 1\nreturn a", id="keyword"),
        pytest.param("match = 1\nmatch x:\n case 1: f()", "a = 1\na x:\n case 1: f()", id="match"),
        pytest.param("a = 1\nreturn eval('a')", "b = 1\nreturn eval('a')", id="string"),
        pytest.param("a = 1\nreturn f'{a}'", "b = 1\nreturn f'{b}'", id="format string"),
        pytest.param("a = 1\nreturn f'{a=}'", "b = 1\nreturn f'{b=}'", id="format string with ="),
        pytest.param("a = 1\nreturn locals()", "b = 1\nreturn locals()", id="locals"),
        pytest.param("a = 1\nreturn __x", "b = 1\nreturn __x", id="underscore"),
        pytest.param("class A:\n a = 1\nA.a", "class A:\n b = 1\nA.a", id="class attribute"),
        pytest.param("a = 1\nreturn \ufb01", "fi = 1\nreturn \ufb01", id="Unicode forms of a name"),
        pytest.param("f() # x\rg()", "f() # x\rh()", id="carriage return"),
        pytest.param("if x:\n        f()\n\tg()", "if x:\n        f()\n        g()", id="tab"),
        pytest.param("return 'a'", "return 'b'", id="string text"),
        pytest.param("return 1", "return 2", id="number"),
        pytest.param("if x:\n  f()\ng()", "if x:\n  f()\n  g()", id="block"),
    ],
)
def test_programs_with_different_meanings_have_different_forms(one, other):
    assert canonical_form(body(one)) != canonical_form(body(other))
    assert canonical_form(one) != canonical_form(other)


@pytest.mark.parametrize("text", ["a = (", "a = 'x", "  a\n b", "a = 1\0", "\ud800 = 1", "'''", ""])
def test_what_is_no_python_is_its_own_form(text):
    assert canonical_form(text) == text
