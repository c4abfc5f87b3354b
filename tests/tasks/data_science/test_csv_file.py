"""The same six cells in every form that people hand over, and what is refused in one line."""

import bz2
import gzip
import io
import lzma
import zipfile

import numpy as np
import pandas as pd
import pytest

from etpo.errors import ConfigError
from etpo_tasks.data_science.datasets import load_dataset

FRAME = pd.DataFrame(
    {"size": [1.5, 2.25] * 6, "café": ["crème", 'a "b", c\nd'] * 6, "kind": ["no", "yes"] * 6}
)
PLAIN = FRAME.to_csv(index=False)


def zipped(**files: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


@pytest.fixture
def read(tmp_path):
    """read(content, **arguments): the data set of a file that holds `content`."""

    def call(content: str | bytes, *, name: str = "mine.csv", **arguments):
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return load_dataset("csv", path=str(file), **arguments)

    return call


@pytest.fixture
def refused(read):
    """refused(content, **arguments): the one line with which the file is refused."""

    def call(content: str | bytes, **arguments) -> str:
        with pytest.raises(ConfigError) as caught:
            read(content, **arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(PLAIN.encode("utf-8-sig"), id="BOM"),
        pytest.param(PLAIN.encode("utf-16"), id="UTF-16"),
        pytest.param("\ufeff".encode("utf-16-be") + PLAIN.encode("utf-16-be"), id="UTF-16 BE"),
        pytest.param(PLAIN.encode("utf-32"), id="UTF-32"),
        pytest.param(FRAME.to_csv(index=False, sep=";"), id="semicolon"),
        pytest.param("sep=;\n" + FRAME.to_csv(index=False, sep=";"), id="Excel's line"),
        pytest.param(FRAME.to_csv(index=False, sep="\t"), id="tab"),
        pytest.param(FRAME.to_csv(index=False, sep="|"), id="pipe"),
        pytest.param(FRAME.to_csv(index=False, quoting=1), id="all quoted"),
        pytest.param(FRAME.to_csv(index=False, lineterminator="\r\n"), id="CRLF"),
        pytest.param(FRAME.to_csv(index=False, lineterminator="\r"), id="CR"),
        pytest.param(PLAIN.rstrip("\n"), id="no last line break"),
        pytest.param("\n\n" + PLAIN.replace("yes\n", "yes\n\n  \n") + "\n\n", id="blank lines"),
        pytest.param(PLAIN.replace("kind\n", "kind,\n").replace("no\n", "no,\n"), id="ragged"),
        pytest.param(PLAIN.replace(",no\n", " , no \t\n"), id="blanks around cells"),
        pytest.param(PLAIN.replace("kind\n", "kind,\n").replace("no\n", "no,\n")
                     .replace("yes\n", "yes,\n"), id="trailing commas"),
        pytest.param(PLAIN.replace("no\n", "no,\n").replace("yes\n", "yes,\n"),
                     id="trailing commas below the header"),
        pytest.param(gzip.compress(PLAIN.encode()), id="gz"),
        pytest.param(bz2.compress(PLAIN.encode()), id="bz2"),
        pytest.param(lzma.compress(PLAIN.encode()), id="xz"),
        pytest.param(zipped(**{"a.csv": PLAIN, "__MACOSX/a.csv": "x"}), id="zip"),
        pytest.param(gzip.compress(FRAME.to_csv(index=False, sep=";").encode("utf-16")), id="all"),
    ],
)  # fmt: skip
def test_one_table_in_many_forms(read, refused, content, request):
    expected = read(PLAIN)
    assert expected.class_names == ("no", "yes")
    assert expected.feature_names == ("size", "café")
    if "[ragged]" in request.node.name:
        assert "line 4 has 3 cells, not 4" in refused(content)
    else:
        assert read(content).content_hash == expected.content_hash


@pytest.mark.parametrize("name", ["mine.csv", "mine.csv.gz", "mine.txt", "MINE"])
@pytest.mark.parametrize(
    "content", [PLAIN.encode(), gzip.compress(PLAIN.encode())], ids=["plain", "gz"]
)
def test_what_a_file_is_called_does_not_count(read, name, content):
    dataset = read(content, name=name)
    assert dataset.content_hash == read(PLAIN).content_hash
    assert dataset.name == name.partition(".")[0]


def test_an_encoding_that_must_be_named(read, refused):
    content = PLAIN.encode("cp1252")
    assert "environment.read_csv.encoding=cp1252" in refused(content)
    named = read(content, read_csv={"encoding": "cp1252"})
    assert named.content_hash == read(PLAIN).content_hash
    for text in (PLAIN, PLAIN.replace("é", "e").replace("è", "e")):
        assert "environment.read_csv.encoding=utf-16-le" in refused(text.encode("utf-16-le"))
    little = read(PLAIN.encode("utf-16-le"), read_csv={"encoding": "utf-16-le"})
    assert little.content_hash == named.content_hash


@pytest.mark.parametrize(
    "options",
    [
        {"sep": ";", "decimal": ",", "thousands": "."},
        {"decimal": ",", "thousands": "."},
    ],
)
def test_decimal_commas_need_their_option(read, refused, options):
    text = "a;b;y\n" + "1,5;1.234,25;no\n2,25;7;yes\n" * 6
    assert "environment.read_csv.decimal" in refused(text)
    dataset = read(text, read_csv=options)
    assert dataset.features[:2].tolist() == [[1.5, 1234.25], [2.25, 7]]
    assert not dataset.categorical.any()


def test_a_separator_of_ones_own(read):
    dataset = read("a b y\n" + "1 2 no\n3 4 yes\n" * 6, read_csv={"sep": " "})
    assert dataset.features[:2].tolist() == [[1, 2], [3, 4]]
    tab = read("a\tb,c\ty\n" + "1\ta,b\tno\n3\tc\tyes\n" * 6, read_csv={"sep": "\\t"})
    assert tab.feature_names == ("a", "b,c")  # a command line hands \t over as two characters


def test_quotes_and_separators_inside_cells_do_not_deceive(read):
    text = 'a;"b,c";y\n' + '"x,1;2";3;no\n"x,""2""";4;yes\n' * 6
    assert read(text).feature_names == ("a", "b,c")


def test_columns_that_are_left_out(read, refused):
    frame = FRAME.assign(id=range(12))[["size", "id", "café", "kind"]]
    for index_col in ("id", 1, ["id"], [1]):
        named = read(frame.to_csv(index=False), read_csv={"index_col": index_col})
        assert named.content_hash == read(PLAIN).content_hash
    line = refused(PLAIN, read_csv={"index_col": "nr"})
    assert "environment.read_csv.index_col=nr" in line
    assert "café" in line


@pytest.mark.parametrize("again", [False, True])
def test_an_index_is_no_feature(read, refused, again):
    """`to_csv()` writes the row numbers, which tell the class of a sorted table."""
    written = FRAME.to_csv()
    if again:
        written = pd.read_csv(io.StringIO(written)).to_csv(index=False)
    assert "environment.read_csv.index_col=0" in refused(written)
    assert read(written, read_csv={"index_col": 0}).content_hash == read(PLAIN).content_hash


def test_a_file_without_a_header(read, refused):
    text = "5.1,3.5,Iris-setosa\n6.2,2.9,Iris-virginica\n" * 6
    assert "environment.read_csv.header=null" in refused(text)
    dataset = read(text, read_csv={"header": None})
    assert dataset.features.shape == (12, 2)
    assert dataset.feature_names == ("0", "1")
    assert read(text, read_csv={"header": None}, target=0).class_names == ("5.1", "6.2")
    letters = "p,x,s\ne,x,s\np,b,y\ne,b,s\n" * 6
    assert "environment.read_csv.header=null" in refused(letters)
    assert read(letters, read_csv={"header": None}, target="0").class_names == ("e", "p")
    years = "1990,2000,y\n" + "1,2,no\n3,4,yes\n" * 6
    assert "environment.read_csv.header=null" in refused(years)
    assert read(years, read_csv={"header": 0}).feature_names == ("1990", "2000")


def test_a_header_of_numbers_that_count_up(read):
    table = np.arange(48).reshape(12, 4) % 5
    frame = pd.DataFrame(table).assign(target=["no", "yes"] * 6)
    assert read(frame.to_csv(index=False)).feature_names == ("0", "1", "2", "3")


def test_empty_names(read):
    rows = "1,2,no\n3,4,yes\n" * 6
    assert read(f"a,,y\n{rows}").feature_names == ("a", "Unnamed: 1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        ("a,a,y\n1,2,no\n", "same name, 'a'"),
        (PLAIN + PLAIN, "repeats the header row"),
        ("# made by hand\n" + PLAIN, "line 2 has 3 cells, not 1"),
        (PLAIN + "1.5,crème\n", "has 2 cells, not 3"),
        (PLAIN + '1.5,"crème,no\n', "cannot be read as CSV"),
        ("a;b,c\n1;2,3\n" * 2, "environment.read_csv.sep"),
        ("a b\n1 no\n2 yes\n", "environment.read_csv.sep"),
        (b"PAR1\x15\x04" + bytes(20) + b"PAR1", "it is Parquet"),
        (b"ARROW1\0\0" + bytes(20) + b"ARROW1", "it is Feather"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "it is Excel"),
        (zipped(**{"[Content_Types].xml": "", "xl/workbook.xml": ""}), "it is a spreadsheet"),
        (zipped(mimetype="", content=""), "it is a spreadsheet"),
        (zipped(a="a", b="b"), "holds 2 files"),
        (gzip.compress(PLAIN.encode())[:40], "cannot be read: EOFError"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "cannot be read"),
        (zipped(a="a")[:20], "cannot be read"),
        (lzma.compress(PLAIN.encode())[:40], "cannot be read"),
        ("<!DOCTYPE html>\n<html>", "it is HTML"),
        ('[{"a": 1}]', "it is JSON"),
        ("@RELATION iris\n@ATTRIBUTE a NUMERIC\n", "it is ARFF"),
        (b"a,y\n1\0,no\n", "NUL"),
    ],
    ids=lambda value: "bytes" if isinstance(value, bytes) else None,
)
def test_a_file_that_is_refused(refused, content, words):
    line = refused(content)
    assert line.startswith("environment.path=")
    assert words in line


@pytest.mark.parametrize("name", ["par1", "PAR1", "arrow1", "ARROW1", "sqlite format 3", "%pdf"])
def test_a_column_may_be_called_as_a_binary_file_begins(read, name):
    assert read(PLAIN.replace("size", name)).feature_names == (name, "café")


def test_an_address_and_a_home(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"environment\.path=https://x\.org/a\.csv is an address"):
        load_dataset("csv", path="https://x.org/a.csv")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").write_text(PLAIN)
    assert load_dataset("csv", path="~/a.csv").class_names == ("no", "yes")


def test_a_named_set_in_data_dir_has_the_same_options(tmp_path):
    (tmp_path / "cmc.csv").write_text("a;y\n" + "1,5;no\n2;yes\n" * 6)
    dataset = load_dataset("cmc", data_dir=str(tmp_path), read_csv={"decimal": ","})
    assert dataset.features[:2].tolist() == [[1.5], [2]]
