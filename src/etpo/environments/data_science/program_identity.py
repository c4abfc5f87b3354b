"""Programs that differ only in what they call their variables, in comments or in blanks."""

import builtins
import io
import keyword
import re
import tokenize

_LAYOUT = {tokenize.INDENT: "\t", tokenize.DEDENT: "\r", tokenize.NEWLINE: "\n"}
_LEFT_OUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
_FORMAT_STRING = getattr(tokenize, "FSTRING_START", None)
_NO_VARIABLES = {*dir(builtins), *keyword.kwlist, *keyword.softkwlist, "build_model"}
_TELLS_NAMES = {
    *("class", "compile", "dir", "eval", "exec", "gc", "getattr", "globals", "inspect", "locals"),
    *("setattr", "sys", "vars"),
}


def canonical_form(program: str) -> str:
    """One text for all programs that are the same up to the names of variables.

    Only the tokens are read; nothing is parsed or run. A name counts as a variable if a statement
    `name = ...` binds it. Where its name could matter (it is a builtin or imported, stands in a
    string or before the = of a keyword argument, or the program can look at names), and where the
    text is no Python or has more than printable ASCII characters and line feeds, the program itself
    is returned.
    """
    if not re.fullmatch(r"[\n -~]*", program):  # the tokenizer and Python split others differently
        return program
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(program).readline))
    except (tokenize.TokenError, SyntaxError):
        return program
    kinds = [token.type for token in tokens if token.type not in _LEFT_OUT]
    words = [_LAYOUT.get(t.type, t.string) for t in tokens if t.type not in _LEFT_OUT]
    fixed = set(_NO_VARIABLES)
    variables: dict[str, str] = {}
    depth, importing = 0, False
    for kind, before, word, after in zip(
        kinds, ["\n", *words], words, [*words[1:], "\n"], strict=False
    ):
        if kind == tokenize.NAME:
            importing = importing or word in ("from", "import")
            if word.startswith("_") or word in _TELLS_NAMES:
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
