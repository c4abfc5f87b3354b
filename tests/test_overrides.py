"""The command line: quotes that hold, hints for what Hydra cannot read, `null` for a group."""

import shlex

import pytest
from hydra import compose, initialize_config_dir

from etpo import train
from etpo.config import CONF
from etpo.errors import ConfigError
from etpo.overrides import parse, shell_word, split_arguments

from .composed import composed

TEXTS = [
    *("plain", "a b", "lr=0.1", "data (1)", "a,b", "[x]", "{y}", "数据", "it's", 'say "x"', "~/m"),
    *("$HOME", "${oc.env:HOME}", "back\\slash", "end\\", "a'b\"c", "null", "007", "1e3", "a:b"),
    *(" lead", "trail ", "", "#x", "%s", "a;b&c", "ü", "true", "\\${x}"),
]


def test_a_printed_value_comes_back_from_shell_and_hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for text in TEXTS:
            if text.startswith("\\$"):
                continue  # OmegaConf has no way to write an escaped interpolation's escape
            path = f"/tmp/{text}/last.ckpt"
            words = [shell_word("ckpt_path", path), shell_word("study", text)]
            cfg = compose("train", shlex.split(" ".join(words)))
            assert (cfg.ckpt_path, cfg.study) == (path, text)


@pytest.mark.parametrize(
    "argument",
    [
        *("environment.path=data (1).csv", "environment.path=a=b.csv", "environment.path=数据.csv"),
        *("model.name_or_path=~/model", "environment.target=petal length (cm)", "study=it's"),
    ],
)
def test_what_hydra_cannot_read_is_answered_with_its_quotes(argument):
    with pytest.raises(ConfigError) as refusal:
        split_arguments([argument])
    line = str(refusal.value)
    assert line.startswith(f"{argument}: ")
    assert "\n" not in line
    (word,) = shlex.split(line.rpartition("characters: ")[2])
    key, _, value = argument.partition("=")
    assert (parse(word).key_or_group, parse(word).value()) == (key, value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["logger=null"], ["logger=csv"]),
        (["logger=wandb", "logger=null", "seed=1"], ["logger=csv", "seed=1"]),
        (["callbacks=null"], ["callbacks=none"]),
        (["experiment=plain", "experiment=null"], []),
        (["sweep=null", "debug=null", "ckpt_path=null"], ["ckpt_path=null"]),
    ],
)
def test_null_for_a_group_means_none(given, kept):
    assert [o.input_line for o in split_arguments(given)[1]] == kept
    assert composed("train", kept)


@pytest.mark.parametrize("group", ["algorithm", "model", "model/prompt", "critic", "trainer"])
def test_null_for_a_group_that_needs_an_option(group):
    with pytest.raises(ConfigError, match=f"{group}=null"):
        split_arguments([f"{group}=null"])


def test_info_takes_no_override_for_its_value():
    flags, overrides = split_arguments(["debug=fast", "--info"])
    assert (flags, [o.input_line for o in overrides]) == (["--info=all"], ["debug=fast"])
    flags, overrides = split_arguments(["--info", "debug=fast", "-m", "--config-dir", "a=b"])
    assert flags == ["--info=all", "-m", "--config-dir", "a=b"]
    assert [o.input_line for o in overrides] == ["debug=fast"]
    assert split_arguments(["--info", "searchpath"])[0] == ["--info", "searchpath"]


def test_the_shells_completion_installs_and_answers(command, monkeypatch):
    ended = command(train.main, "-sc", "install=bash")
    assert ended.status == 0, ended.err
    assert "complete" in ended.out
    monkeypatch.setenv("COMP_LINE", "etpo-train environment=sok")
    ended = command(train.main, "-sc", "query=bash")
    assert ended.out.split() == ["environment=sokoban"]
