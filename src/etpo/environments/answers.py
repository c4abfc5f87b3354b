"""The part of an action's text that an environment receives."""

import re

from etpo.errors import ConfigError, described

KEY = "environment.answer"
ALLOWED = "null, first_line, last_line, fenced, tag:NAME, or a regular expression with one group"
_LINE = re.compile(r"^(?P<answer>.*\S.*)$", re.MULTILINE)
# A block of CommonMark that starts with three or more backticks or tildes and ends at such a fence
# or at the end of the text.
_FENCED = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[^`\n]*\n"
    r"(?P<answer>.*?)\n?(?:^[ \t]*(?P=fence)[`~]*[ \t\r]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)


class AnswerFormat:
    """Find the answer in the text of an action.

    Of several matches the last one counts, except for `first_line`.

    Args:
        value: `first_line` or `last_line` that is not blank, `fenced` (the content of a block of
            code), `tag:NAME` (the text after <NAME>, up to </NAME> or the end), or a regular
            expression with one group.

    Raises:
        ConfigError: another value.
    """

    def __init__(self, value: str) -> None:
        self.value, self.form = value, "{}"
        self.place = 0 if value == "first_line" else -1
        tag = re.fullmatch(r"tag:(\w[\w.-]*)", str(value))
        if value in ("first_line", "last_line"):
            self.pattern = _LINE
        elif value == "fenced":
            self.pattern, self.form = _FENCED, "```\n{}\n```"
        elif tag:
            start, end = f"<{tag[1]}>", f"</{tag[1]}>"
            self.form = f"{start}{{}}{end}"
            self.pattern = re.compile(
                rf"{re.escape(start)}\s*(?P<answer>.*?)\s*(?:{re.escape(end)}|\Z)", re.DOTALL
            )
        else:
            self.pattern = self._compiled(value)

    @staticmethod
    def _compiled(value: object) -> re.Pattern[str]:
        """Compile a regular expression with one group."""
        try:
            pattern = re.compile(value) if isinstance(value, str) else None
        except re.error as error:
            raise ConfigError(
                f"{KEY}={value}: allowed are {ALLOWED} ({described(error)})"
            ) from None
        if pattern is None or pattern.groups != 1:
            raise ConfigError(f"{KEY}={value}: allowed are {ALLOWED}")
        return pattern

    def find(self, text: str) -> str | None:
        """Return the answer in a text, or None."""
        matches = list(self.pattern.finditer(text))
        if not matches:
            return None
        answer = matches[self.place]["answer" if "answer" in self.pattern.groupindex else 1]
        return answer.strip() if self.pattern is _LINE and answer is not None else answer

    def written(self, answer: str) -> str:
        """Return a text with this answer, for a worked example.

        Raises:
            ConfigError: the answer would not be found in it.
        """
        text = self.form.format(answer)
        if self.find(text) != answer:
            raise ConfigError(
                f"{KEY}={self.value}: the worked example with the answer {answer!r} has no such "
                "answer; allowed with environment.examples are formats that find the answers"
            )
        return text
