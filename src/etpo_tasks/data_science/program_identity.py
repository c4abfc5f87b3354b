"""Canonical form of programs, independent of variable names, comments and blanks."""

import builtins
import io
import keyword
import re
import tokenize

_LAYOUT = {tokenize.INDENT: "\t", tokenize.DEDENT: "\r", tokenize.NEWLINE: "\n"}
_IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
_FORMAT_STRING = getattr(tokenize, "FSTRING_START", None)
_RESERVED = {*dir(builtins), *keyword.kwlist, *keyword.softkwlist, "build_model"}
_INTROSPECTION = {
    *("class", "compile", "dir", "eval", "exec", "gc", "getattr", "globals", "inspect", "locals"),
    *("setattr", "sys", "vars"),
}


def canonical_form(program: str) -> str:
    """Return the same text for programs that differ only in variable names, comments and blanks.

    A name is a variable if a statement `name = ...` binds it. Returns the program unchanged if a
    variable's name could matter: it is a builtin, imported, in a string or a keyword argument, or
    the program can inspect names. Text that is not printable ASCII or not Python is also unchanged.
    """
    if not re.fullmatch(r"[\n -~]*", program):  # else the tokenizer may differ from Python
        return program
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(program).readline))
    except (tokenize.TokenError, SyntaxError):
        return program
    kinds = [token.type for token in tokens if token.type not in _IGNORED]
    words = [_LAYOUT.get(t.type, t.string) for t in tokens if t.type not in _IGNORED]
    fixed = set(_RESERVED)
    variables: dict[str, str] = {}
    depth, importing = 0, False
    for kind, before, word, after in zip(
        kinds, ["\n", *words], words, [*words[1:], "\n"], strict=False
    ):
        if kind == tokenize.NAME:
            importing = importing or word in ("from", "import")
            if word.startswith("_") or word in _INTROSPECTION:
                return program
            if importing or (after == "=" and depth > 0):
                fixed.add(word)
            elif after == "=" and before in _LAYOUT.values():
                variables.setdefault(word, f"?{len(variables)}")
        elif kind == tokenize.STRING:  # in Python 3.11 a format string too
            fixed.update(re.findall(r"\w+", word))
        elif kind == tokenize.NEWLINE:
            importing = False
        elif kind == tokenize.OP:
            depth += (word in "([{") - (word in ")]}")
            if importing and word == "*":
                return program
        elif kind in (tokenize.ERRORTOKEN, _FORMAT_STRING):
            return program
    if not fixed.isdisjoint(variables):
        return program
    return " ".join(
        word if before == "." else variables.get(word, word)
        for before, word in zip(["\n", *words], words, strict=False)
    )
