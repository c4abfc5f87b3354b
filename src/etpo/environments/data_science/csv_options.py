"""Options of `pandas.read_csv` that a data set's file may need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from etpo.errors import ConfigError


@dataclass(frozen=True)
class CsvOptions:
    """Options of `pandas.read_csv` (`environment.read_csv`), with its names and meanings.

    sep: one character; None: the one of comma, semicolon, tab and | that fits.
    encoding: None: UTF-8, or the encoding of the byte order mark.
    header: 0: the first row; None: there is none, columns are called 0, 1, ...; "infer": the first
        row, which is refused where it looks like data.
    index_col: names or positions of columns that are left out.
    decimal, thousands: one character each. dtype: {column: str} keeps numbers as categories.
    na_values: further texts of missing cells; the default is what OpenML writes.
    keep_default_na: whether the texts that pandas knows are missing cells, too.

    Raises ConfigError for another option or value.
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
        """From a mapping; ConfigError names the options that are known."""
        names = [field.name for field in fields(cls)]
        for name in options or {}:
            if name not in names:
                raise ConfigError(
                    f"environment.read_csv.{name} is unknown; allowed: {', '.join(names)}"
                )
        return cls(**(options or {}))

    def __post_init__(self) -> None:
        if self.sep == "\\t":  # as a command line hands it over
            object.__setattr__(self, "sep", "\t")
        for key, optional in (("sep", True), ("decimal", False), ("thousands", True)):
            value = getattr(self, key)
            if value is None and optional:
                continue
            if not isinstance(value, str) or len(value) != 1:
                raise ConfigError(f"environment.read_csv.{key}={value}: allowed is one character")
        if self.decimal == self.thousands:
            raise ConfigError(
                f"environment.read_csv.thousands={self.thousands}: allowed is another character "
                "than environment.read_csv.decimal"
            )
        if self.header not in ("infer", 0, None):
            raise ConfigError(
                f"environment.read_csv.header={self.header}: allowed are infer, 0, null"
            )
        if isinstance(self.na_values, str) or not isinstance(self.na_values, Sequence):
            raise ConfigError(f"environment.read_csv.na_values={self.na_values}: allowed is a list")
        if not isinstance(self.keep_default_na, bool):
            raise ConfigError(
                f"environment.read_csv.keep_default_na={self.keep_default_na}: allowed are true, "
                "false"
            )
        if self.dtype is not None and not isinstance(self.dtype, Mapping):
            raise ConfigError(
                f"environment.read_csv.dtype={self.dtype}: allowed is a mapping, {{column: str}}"
            )
