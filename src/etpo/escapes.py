"""Escapes in texts of the command line."""

import re

ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""Replace \n, \r, \t and \\ as in Python; a shell passes them as two characters."""
    return re.sub(r"\\([nrt\\])", lambda match: ESCAPES[match[1]], text)
