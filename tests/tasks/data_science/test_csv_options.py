import contextlib
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from etpo.config import CONF
from etpo.errors import ConfigError
from etpo_tasks.data_science.csv_file import CsvOptions
from etpo_tasks.data_science.datasets import load_dataset


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("sep", ";;", "one character"),
        ("sep", "", "one character"),
        ("decimal", None, "one character"),
        ("thousands", ".", "another character"),
        ("header", 1, "infer, 0 or null"),
        ("na_values", "NA", "a list"),
        ("keep_default_na", "no", "true or false"),
        ("dtype", "str", "a mapping"),
        ("skiprows", 1, "allowed: sep, encoding, header"),
    ],
)
def test_an_option_out_of_range(key, value, allowed):
    with pytest.raises(ConfigError, match=rf"environment\.read_csv\.{key}.*{allowed}"):
        CsvOptions.of({key: value})


def test_the_configuration_holds_the_defaults():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train")
    assert CsvOptions.of(OmegaConf.to_container(cfg.environment.read_csv)) == CsvOptions(
        na_values=["?"]
    )


def rows(first: str, second: str) -> str:
    """A file with a column of two cells in turn, one of small numbers, and a target."""
    return "big value;b;y\n" + f"{first};1;no\n{second};2;yes\n" * 6


@pytest.mark.parametrize(
    ("content", "target"),
    [
        (rows("3,5", "4"), "y"),
        (rows("12345678901234567", "12345678901234568"), "y"),
        ("a;b;y\n" + "1;1;no\n-;2;yes\n2;3;no\n3;3;yes\n" * 6, "y"),
        (rows("NA", "DE"), "big value"),
        (rows("é", "e"), "y"),
        ("a,b;c,y\n" + "p,q;r,no\n1,2;4,yes\n" * 6, "y"),
        ("a b\n" + "1 no\n2 yes\n" * 6, "b"),
        ("1.5;no\n" + "2;no\n3;yes\n" * 6, None),
        (";b;y\n" + "".join(f"{i};{i % 5};{'ny'[i % 2]}\n" for i in range(12)), "y"),
    ],
)
def test_the_overrides_that_a_refusal_names_can_be_pasted(content, target, tmp_path):
    """One of them at least reads the file."""
    file = tmp_path / "mine.csv"
    file.write_text(content, encoding="cp1252")
    with pytest.raises(ConfigError) as caught:
        load_dataset("csv", path=str(file), target=target)
    named = (
        r""""environment\.read[^"]*"|'environment\.read[^']*'|environment\.read_csv\.\w+=[\w-]+"""
    )
    advice = [shlex.split(found) for found in re.findall(named, str(caught.value))]
    assert advice
    together = [[override for one in advice for override in one]] if target == "big value" else []
    read = 0
    for overrides in [*advice, *together]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            options = compose("train", overrides).environment.read_csv
        with contextlib.suppress(ConfigError):
            read += len(load_dataset("csv", path=str(file), target=target, read_csv=options).target)
    assert read > 0
