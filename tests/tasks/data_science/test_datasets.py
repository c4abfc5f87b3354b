import csv
import json
import urllib.error

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from sklearn.utils import Bunch

from etpo.errors import ConfigError
from etpo_tasks.data_science import datasets
from etpo_tasks.data_science.datasets import load_dataset


def write(folder, text, name="mine.csv"):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return str(file)


def labelled(rows, header="a,b,label"):
    """Rows `x,y` with classes no/yes in turn."""
    lines = [f"{row},{'yes' if i % 2 else 'no'}" for i, row in enumerate(rows)]
    return "\n".join([header, *lines]) + "\n"


@pytest.mark.parametrize("name", ["tic_tac_toe", "balance_scale"])
def test_generated_rows_are_those_of_openml(name, data_dir):
    with (data_dir / f"{name}.csv").open(newline="") as lines:
        header, *rows = csv.reader(lines)
    table = datasets._GENERATED[name]().map(str)
    assert list(table.columns) == header
    assert len(table) == len(rows)
    assert set(table.itertuples(index=False, name=None)) == set(map(tuple, rows))


def test_tic_tac_toe_is_encoded_over_sorted_categories():
    dataset = load_dataset("tic_tac_toe")
    assert dataset.features.shape == (958, 9)
    assert dataset.features.dtype == np.float64
    assert dataset.target.dtype == np.int64
    assert dataset.class_names == ("negative", "positive")
    assert dataset.target.sum() == 626
    assert dataset.categorical.all()
    # b, o, x are 0, 1, 2: a board that x has won has three 2s at least
    assert set(np.unique(dataset.features)) == {0.0, 1.0, 2.0}
    assert ((dataset.features == 2).sum(axis=1)[dataset.target == 1] >= 3).all()


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("iris", (150, 4), 3),
        ("wine", (178, 13), 3),
        ("breast_cancer", (569, 30), 2),
        ("digits", (1797, 64), 10),
    ],
)
def test_bundled_sets(name, shape, classes):
    dataset = load_dataset(name)
    assert dataset.features.shape == shape
    assert dataset.n_classes == classes
    assert not dataset.categorical.any()


def test_bundled_numbers_are_exact():
    assert (load_dataset("iris").features == load_iris().data).all()


@pytest.mark.parametrize("name", ["credit_g", "health_insurance", "cmc"])
@pytest.mark.parametrize("missing", ["impute", "drop"])
def test_real_csv_against_its_description(name, missing, data_dir):
    facts = {f["name"]: f for f in json.loads((data_dir / "datasets.json").read_text())}[name]
    dataset = load_dataset("csv", path=str(data_dir / f"{name}.csv"), missing=missing)
    rows = facts["n_rows"] if missing == "impute" else facts["complete_rows"]
    assert dataset.name == name
    assert dataset.features.shape == (rows, facts["n_features"])
    assert np.isnan(dataset.features).sum() == (
        facts["missing_cells"] if missing == "impute" else 0
    )
    if missing == "impute":
        counts = dict(zip(dataset.class_names, np.bincount(dataset.target).tolist(), strict=True))
        assert counts == facts["class_counts"]
    # columns declared nominal there that hold digits are numbers here
    encoded = {n for n, c in zip(dataset.feature_names, dataset.categorical, strict=True) if c}
    assert encoded <= set(facts["categorical_columns"])


def test_named_file_is_found_in_data_dir_and_in_the_environment_variable(data_dir, monkeypatch):
    by_key = load_dataset("breast_w", data_dir=str(data_dir))
    monkeypatch.setenv("ETPO_DATA_DIR", str(data_dir))
    by_variable = load_dataset("breast_w")
    by_path = load_dataset("csv", path=str(data_dir / "breast_w.csv"))
    assert by_key.features.shape == (699, 9)
    assert by_key.content_hash == by_variable.content_hash == by_path.content_hash


def test_encoding_by_hand(tmp_path):
    text = "size,colour,kind\n" + "1.5,red,10\n,blue,9\n2, red ,10\n?,NA,9.0\n" * 2 + "3,red,\n"
    dataset = load_dataset("csv", path=write(tmp_path, text))
    nan = np.nan
    expected = [[1.5, 1], [nan, 0], [2, 1], [nan, nan]] * 2  # the last row has no class
    np.testing.assert_array_equal(dataset.features, expected)
    assert dataset.target.tolist() == [1, 0, 1, 0] * 2  # 9 before 10: numbers sort as numbers
    assert dataset.class_names == ("9", "10")
    assert dataset.categorical.tolist() == [False, True]


def test_target_by_name_and_semantic_hash(tmp_path):
    first = load_dataset("csv", path=write(tmp_path, labelled(["1,2", "3,4"] * 4)))
    text = "label,a,b\n" + "no,1,2\nyes,3,4\n" * 4
    named = load_dataset("csv", path=write(tmp_path, text, "other.csv"), target="label")
    assert named.feature_names == ("a", "b")
    assert named.content_hash == first.content_hash
    changed = load_dataset("csv", path=write(tmp_path, labelled(["1,2", "3,5"] * 4)))
    assert changed.content_hash != first.content_hash


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["True", "False"], ("False", "True")),
        (["1", "0"], ("0", "1")),
        (["-1", "1"], ("-1", "1")),
        (["2.5", "10"], ("2.5", "10")),
        (["é", "z"], ("z", "é")),
        (["yes, often", "0"], ("0", "yes, often")),
    ],
)
def test_classes_of_any_kind(labels, names, tmp_path):
    rows = "".join(f'{i},"{labels[i % 2]}"\n' for i in range(8))
    dataset = load_dataset("csv", path=write(tmp_path, "a,y\n" + rows))
    assert dataset.class_names == names
    assert [names[label] for label in dataset.target] == [labels[i % 2] for i in range(8)]


def test_a_large_set_is_a_stratified_sample(tmp_path):
    """9,000 rows of class r, 900 of s, 100 of t; the rare category is in one row alone."""
    kinds = ["r"] * 9000 + ["s"] * 900 + ["t"] * 100
    rows = "".join(
        f"{i},{'a' if i == 7 else 'b' if i % 2 else 'c'},{k}\n" for i, k in enumerate(kinds)
    )
    path = write(tmp_path, "n,colour,kind\n" + rows)
    whole = load_dataset("csv", path=path)
    assert len(whole.target) == 10_000
    assert load_dataset("csv", path=path, max_rows=10_000).content_hash == whole.content_hash
    one = load_dataset("csv", path=path, max_rows=1000, seed=1)
    assert np.bincount(one.target).tolist() == [900, 90, 10]
    row = one.features[:, 0].astype(int)
    assert (np.diff(row) > 0).all()  # order of the file, no row twice
    np.testing.assert_array_equal(one.features, whole.features[row])
    np.testing.assert_array_equal(one.target, whole.target[row])
    again = load_dataset("csv", path=path, max_rows=1000, seed=1)
    other = load_dataset("csv", path=path, max_rows=1000, seed=2)
    assert again.content_hash == one.content_hash
    assert len({one.content_hash, other.content_hash, whole.content_hash}) == 3
    # one row less than all: a class may lose none
    assert len(load_dataset("csv", path=path, max_rows=9999).target) == 9999


MANY = "\n".join(["a,y", *(f"{i},{i * 0.37}" for i in range(40))])


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("", None, "environment.path=.*is empty"),
        ("a,b,label\n", None, "environment.path=.*no data rows"),
        (labelled(["1,2"] * 8), "lable", "environment.target=lable is no column.*label"),
        ("a,y\n" + "1,no\n" * 8, None, "environment.path=.*'y' is constant"),
        ("a,y\n" + "1,\n" * 8, None, "target 'y' has no value"),
        (MANY, None, "40 distinct values.*regression"),
        (MANY.replace(",", ",c"), None, "40 distinct values; at most 20"),
        ("a,y\n" + "1,no\n" * 8 + "2,yes\n" * 3, None, "class 'yes' has 3 of 11 rows"),
        ("y\n" + "no\nyes\n" * 8, None, "no feature column"),
        (labelled([",?"] * 8), None, "every feature cell is missing"),
        (labelled(["1,2"] * 8 + ["1,2,3"]), None, "line 10 has 4 cells, not 3"),
        (labelled(["1,2"] * 8, "a,a,y"), None, "same name"),
        (labelled(["1,1e999"] * 8), None, "'b' holds an infinite number"),
    ],
)
def test_unusable_csv(text, target, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected) as caught:
        load_dataset("csv", path=write(tmp_path, text), target=target)
    assert "\n" not in str(caught.value)


def test_dropping_every_row_names_the_key(tmp_path):
    path = write(tmp_path, labelled([",2"] * 8))
    assert load_dataset("csv", path=path).features.shape == (8, 2)
    with pytest.raises(ConfigError, match=r"environment\.missing=drop"):
        load_dataset("csv", path=path, missing="drop")


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"environment\.path=.*no such file"):
        load_dataset("csv", path=str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match=r"environment\.path=.*cannot be read"):
        load_dataset("csv", path=str(tmp_path))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"environment\.path=.*cannot be read"):
        load_dataset("csv", path=str(tmp_path / "binary.csv"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "tictactoe"}, r"environment\.dataset=tictactoe .*mean tic_tac_toe.*known:.*iris"),
        ({"name": "csv"}, r"environment\.path=FILE\.csv is needed"),
        ({"name": "iris", "path": "x.csv"}, r"environment\.path is read with"),
        ({"name": "iris", "target": "x"}, r"environment\.target is read with"),
        ({"name": "iris", "missing": "skip"}, r"environment\.missing=skip.*impute, drop"),
        ({"name": "cmc", "data_dir": "/no/folder"}, r"environment\.data_dir=/no/folder"),
        ({"name": "iris", "max_rows": 0}, r"environment\.max_rows=0: allowed is 1 or more"),
        ({"name": "iris", "max_rows": 10}, r"environment\.max_rows=10 leaves class '\w+'.* 3 rows"),
        (
            {"name": "pharyngitis"},
            r"pharyngitis\.csv.*kaggle\.com/datasets/yoshifumimiya/pharyngitis.*target=radt",
        ),
        ({"name": "spaceship_titanic"}, r"kaggle\.com/competitions/spaceship-titanic"),
    ],
)
def test_bad_arguments(arguments, expected, monkeypatch):
    monkeypatch.delenv("ETPO_DATA_DIR", raising=False)
    with pytest.raises(ConfigError, match=expected):
        load_dataset(**arguments)


def test_openml_failure_is_one_line(tmp_path, monkeypatch):
    def fail(**_):
        raise urllib.error.URLError("no\nroute")

    monkeypatch.setattr(datasets.bundled, "fetch_openml", fail)
    with pytest.raises(ConfigError, match=r"eucalyptus\.csv.*OpenML.*no route.*environment\.path"):
        load_dataset("eucalyptus", data_dir=str(tmp_path))


def test_openml_frame_is_encoded_like_the_csv(data_dir, monkeypatch):
    """The frame as fetch_openml(as_frame=True) gives it: numbers, categories, None and NaN."""
    frame = pd.read_csv(data_dir / "credit_g.csv", keep_default_na=False)
    for column in frame.select_dtypes(exclude="number"):
        frame[column] = frame[column].astype("category")
    asked = {}

    def fetch(**arguments):
        asked.update(arguments)
        return Bunch(data=frame.drop(columns="class"), target=frame["class"])

    monkeypatch.delenv("ETPO_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets.bundled, "fetch_openml", fetch)
    fetched = load_dataset("credit_g")
    assert asked["data_id"] == 31
    assert fetched.content_hash == load_dataset("credit_g", data_dir=str(data_dir)).content_hash


def test_openml_missing_cells(monkeypatch):
    category = pd.Series(["u", None] * 4, dtype="category")
    text = pd.Series(["u", None] * 4, dtype=object)
    boolean = pd.Series([True, pd.NA] * 4, dtype="boolean")
    data = pd.DataFrame({"n": [1.0, np.nan] * 4, "c": category, "s": text, "b": boolean})
    content = Bunch(data=data, target=pd.Series(["p", "q"] * 4, name="t", dtype="category"))
    monkeypatch.delenv("ETPO_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets.bundled, "fetch_openml", lambda **_: content)
    dataset = load_dataset("eucalyptus")
    np.testing.assert_array_equal(dataset.features, [[1, 0, 0, 0], [np.nan] * 4] * 4)
