"""What the cells of a column and of the target mean: as pandas reads them, and nothing is lost."""

import io

import numpy as np
import pandas as pd
import pytest

from etpo.errors import ConfigError
from etpo_tasks.data_science import encoding
from etpo_tasks.data_science.csv_file import CsvOptions
from etpo_tasks.data_science.encoding import Dataset, encode

MISSING = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"]
MISSING += ["1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns)


def encoded(columns: tuple[str, ...], rows: list[tuple[str, ...]], **options) -> Dataset:
    return encode("d", table(columns, rows), "y", "impute", CsvOptions(**options))


def column(*cells: str, **options) -> tuple[list, bool]:
    """The encoded feature of these cells, and whether it is categorical."""
    filled = [*cells] * 4
    rows = [(cell, "constant", f"c{i % 2}") for i, cell in enumerate(filled)]
    dataset = encode("d", table(("v", "w", "y"), rows), "y", "impute", CsvOptions(**options))
    numbers = dataset.features[: len(cells), 0].tolist()
    return [None if np.isnan(x) else x for x in numbers], bool(dataset.categorical[0])


def classes(*cells: str, **options) -> tuple[str, ...]:
    """The class names of a target of these cells."""
    rows = [(str(i), cell) for i, cell in enumerate([*cells] * 4)]
    return encode("d", table(("v", "y"), rows), "y", "impute", CsvOptions(**options)).class_names


@pytest.mark.parametrize("word", [*MISSING, "?"])
def test_the_words_for_a_missing_cell(word):
    assert column("1.5", word, "2") == ([1.5, None, 2], False)
    assert column("red", word, "blue") == ([1, None, 0], True)
    assert column(word, "True", "False") == ([None, 1, 0], True)


@pytest.mark.parametrize(
    ("cells", "numbers", "categorical"),
    [
        (("0_9", "10_19", "20_29"), [0, 1, 2], True),
        (("1_0", "10", "2_0"), [1, 0, 2], True),
        (("0x10", "16"), [0, 1], True),
        (("007", "7", "8"), [7, 7, 8], False),
        (("1e5", "100000", "-2.5E-1"), [1e5, 1e5, -0.25], False),
        (("9007199254740993", "1"), [2.0**53, 1], False),  # rounded, but alone
        (("123456789012345678901234567890", "1"), [123456789012345678901234567890.0, 1], False),
        (("True", "FALSE", "true"), [1, 0, 1], True),
        (("yes", "no", "Yes"), [2, 1, 0], True),
        (("2024-02-01", "2023-12-31"), [1, 0], True),
        (("01/02/2024", "31/12/2023"), [0, 1], True),
        (("12.05.2020", "13.05.2020"), [0, 1], True),
        (("1.2.3", "1.10.0"), [1, 0], True),
        (("14+", "13", "2"), [1, 0, 2], True),
        (("१२", "12"), [1, 0], True),  # pandas reads ASCII digits alone as numbers
        (("e\u0301", "\u00e9"), [0, 1], True),  # two ways to write one letter
        (("-0", "0", "1"), [0, 0, 1], False),
        (("a", "b", "B"), [1, 2, 0], True),
    ],
)  # fmt: skip
def test_a_column(cells, numbers, categorical):
    assert column(*cells) == (numbers, categorical)


@pytest.mark.parametrize(
    "cells",
    [
        ("1,234", "999"),
        ("1,234,567.89", "12"),
        ("1 234", "1"),
        ("1.234.567", "1.234"),
        ("3,5", "4,25"),
        ("$1,200", "$3"),
        ("12 €", "7,50 €"),
        ("12%", "7.5%"),
        ("-1'234.5", "2"),
    ],
)
def test_numbers_with_signs_and_separators_are_no_categories(cells):
    with pytest.raises(ConfigError, match=r"column 'v'.*environment\.read_csv\.decimal"):
        column(*cells)
    assert column(*cells, dtype={"v": "str"})[1]


def test_thousands_and_decimals():
    assert column("1,234", "999", thousands=",") == ([1234, 999], False)
    assert column("1.234,5", "9", thousands=".", decimal=",") == ([1234.5, 9], False)


@pytest.mark.parametrize("word", ["-", "unknown", "missing", "NAN", "#DIV/0!", "..", "none"])
def test_one_word_makes_no_categories_of_numbers(word):
    with pytest.raises(ConfigError, match=r"column 'v' holds numbers and.*na_values=\['\?','"):
        column("1.5", word, "2")
    assert column("1.5", word, "2", na_values=["?", word]) == ([1.5, None, 2], False)
    assert column("1.5", word, "2", dtype={"v": "str"})[1]


@pytest.mark.parametrize(
    ("cells", "error"),
    [
        (("12345678901234567", "12345678901234568"), "beyond 2"),
        (("12345678901234567", "12345678901234568", ""), "beyond 2"),  # float64 in pandas
        (("184467440737095516150", "184467440737095516151"), "beyond 2"),
        (("9223372036854775808", "9223372036854775809", ""), "beyond 2"),
        (("inf", "1"), "infinite"),
        (("-Infinity", "1"), "infinite"),
        (("1e999", "1"), "infinite"),
    ],
)
def test_numbers_that_float64_does_not_hold(cells, error):
    with pytest.raises(ConfigError, match=f"column 'v' holds .*{error}"):
        column(*cells)


@pytest.mark.parametrize("word", [*MISSING, "?"])
def test_a_missing_cell_among_integers_that_int64_does_not_hold(word):
    """pandas reads such a column as text and keeps the words for a missing cell."""
    assert column("9223372036854775808", word, "1") == ([2.0**63, None, 1], False)
    assert column("9223372036854775808", word) == ([2.0**63, None], False)
    assert column("9223372036854775808", word, "a") == ([0, None, 1], True)
    assert column("9223372036854775808", word, "-1") == ([2.0**63, None, -1], False)


def test_rows_with_a_missing_cell_among_such_integers_are_dropped():
    rows = [(["9223372036854775808", "1", ""][i % 3], "w", f"c{i // 3 % 2}") for i in range(24)]
    assert len(encode("d", table(("v", "w", "y"), rows), "y", "drop").target) == 16


def test_a_text_column_by_request():
    assert column("007", "7", "12", dtype={"v": "str"}) == ([0, 2, 1], True)
    with pytest.raises(ConfigError, match=r"environment\.read_csv\.dtype.*'zip'"):
        column("007", "7", dtype={"zip": "str"})
    with pytest.raises(ConfigError, match=r"environment\.read_csv\.dtype"):
        column("a", "7", dtype={"v": "int"})


def test_keep_default_na_is_that_of_pandas():
    assert column("NA", "x", "", keep_default_na=False, na_values=[""]) == ([0, 1, None], True)


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (("1_0", "10", "2"), ("10", "1_0", "2")),
        (("1", "1.0", "0"), ("0", "1")),
        (("+1", "-1"), ("-1", "1")),
        (("10", "9"), ("9", "10")),
        (("0", "-0", "1"), ("0", "1")),
        (("0.1", "0.30000000000000004", "0.3"), ("0.1", "0.3", "0.30000000000000004")),
        (("12345678901234567", "12345678901234568"), ("12345678901234567", "12345678901234568")),
        (("9" * 40, "9" * 39 + "8"), ("9" * 39 + "8", "9" * 40)),
        (("007", "7"), ("007", "7")),
        (("1e5", "100000"), ("100000", "1e5")),
        (("0x10", "16"), ("0x10", "16")),
        (("inf", "1"), ("1", "inf")),
        (("True", "False"), ("False", "True")),
        (("1,5", "2,5"), ("1,5", "2,5")),
        (("2024-01-01", "2024-01-02"), ("2024-01-01", "2024-01-02")),
        (("e\u0301", "\u00e9"), ("e\u0301", "\u00e9")),
        (("none", "-"), ("-", "none")),
    ],
)  # fmt: skip
def test_the_classes_of_a_target(cells, names):
    assert classes(*cells) == names


@pytest.mark.parametrize("word", MISSING[1:])
def test_a_class_that_pandas_takes_for_a_missing_cell_is_not_lost(word):
    """NA is Namibia, None an answer: nobody but the user knows."""
    with pytest.raises(ConfigError, match=r"target 'y' holds .*environment\.read_csv\.na_values"):
        classes("DE", word, "FR")
    assert classes("DE", word, "FR", na_values=["?", word]) == ("DE", "FR")
    kept = classes("DE", word, "FR", keep_default_na=False, na_values=["", "?"])
    assert set(kept) == {"DE", word, "FR"}


def test_rows_without_a_class_are_left_out():
    assert classes("no", "", "yes", "?") == ("no", "yes")


def test_what_stands_below_the_table_makes_no_categories():
    """A last line as `Total,,` has no class."""
    rows = [("1.5", "a", "no"), ("2", "b", "yes")] * 4 + [("Total", "", "")]
    dataset = encoded(("v", "w", "y"), rows)
    assert dataset.categorical.tolist() == [False, True]
    assert len(dataset.target) == 8


def test_constant_and_empty_columns_stay():
    numbers, categorical = column("", "", "")
    assert (numbers, categorical) == ([None] * 3, False)
    assert column("5", "5") == ([5, 5], False)


def test_a_target_that_is_misspelt():
    rows = [("1", "no"), ("2", "yes")] * 4
    for target in ("Survived ", "survived", "Survivd"):
        with pytest.raises(ConfigError, match=r"environment\.target=.*did you mean Survived\?"):
            encode("d", table(("v", "Survived"), rows), target, "impute")


def test_pandas_reads_the_same_words_as_missing_cells():
    lines = "".join(f'"{word}",x\n' for word in [*sorted(encoding._MISSING), "none", "-", "N.A."])
    read = pd.read_csv(io.StringIO(lines), header=None, dtype=str)[0]
    assert read.isna().sum() == len(encoding._MISSING) == len(read) - 3
