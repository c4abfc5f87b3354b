"""Options of `pandas.read_csv` that the file of a data set may need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from etpo.errors import ConfigError


@dataclass(frozen=True)
class CsvOptions:
    """Options of `pandas.read_csv` (`environment.read_csv`), with the same names and meanings.

    Args:
        sep: one character; None: whichever of comma, semicolon, tab and | fits.
        encoding: None: UTF-8, or the encoding of the byte order mark.
        header: 0: the first row; None: no header, columns are named 0, 1, ...; "infer": the first
            row, which is refused if it looks like data.
        index_col: names or positions of columns to drop.
        decimal, thousands: one character each.
        na_values: further texts of missing cells; the default is the one that OpenML writes.
        keep_default_na: treat the texts that pandas knows as missing cells, too.
        dtype: {column: str} keeps numbers as categories.

    Raises ConfigError for an unknown option or a value that is not allowed.
    """

    sep: str | None = None
    encoding: str | None = None
    header: int | str | None = "infer"
    index_col: Any = None
    decimal: str = "."
    thousands: str | None = None
    na_values: Sequence[Any] = ("?",)
    keep_default_na: bool = True
    dtype: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "CsvOptions":
        """Create the options from a mapping; ConfigError for an unknown name."""
        names = [field.name for field in fields(cls)]
        for name in options or {}:
            if name not in names:
                raise ConfigError(
                    f"environment.read_csv.{name} is unknown; allowed: {', '.join(names)}"
                )
        return cls(**(options or {}))

    def __post_init__(self) -> None:
        if self.sep == "\\t":  # as a command line passes it
            object.__setattr__(self, "sep", "\t")
        is_list = isinstance(self.na_values, Sequence) and not isinstance(self.na_values, str)
        checks = (
            ("sep", self.sep is None or is_character(self.sep), "one character"),
            ("decimal", is_character(self.decimal), "one character"),
            ("thousands", self.thousands is None or is_character(self.thousands), "one character"),
            ("thousands", self.thousands != self.decimal, "another character than for decimal"),
            ("header", self.header in ("infer", 0, None), "infer, 0 or null"),
            ("na_values", is_list, "a list"),
            ("keep_default_na", isinstance(self.keep_default_na, bool), "true or false"),
            ("dtype", isinstance(self.dtype, Mapping | None), "a mapping, {column: str}"),
        )
        for key, valid, allowed in checks:
            if not valid:
                value = getattr(self, key)
                raise ConfigError(f"environment.read_csv.{key}={value}: allowed is {allowed}")


def is_character(value: object) -> bool:
    return isinstance(value, str) and len(value) == 1
