"""The block that is printed before the first iteration, against what the run then takes."""

import json
import re

import pytest

from etpo.callbacks.start import StartReport, short

MIB = {"MiB": 1, "GiB": 1024}


def row(out, label):
    """The text of a row of the block, which comes before the first iteration."""
    block = out.partition("iteration 1/")[0]
    (found,) = re.findall(rf"^  {label} +(.*)$", block, re.MULTILINE)
    return found


def sizes(text):
    """The sizes that a text holds, in MiB."""
    return [float(n) * MIB[unit] for n, unit in re.findall(r"([\d.]+) (MiB|GiB)", text)]


def check_expected(out, folder):
    """Memory and checkpoints are within 30% of what the run took."""
    summary = json.loads((folder / "summary.json").read_text())
    (memory,) = sizes(row(out, "memory"))
    assert memory == pytest.approx(summary["peak_memory_mib"], rel=0.3)
    files = [folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    expected = [file.stat().st_size / 2**20 for file in files]
    assert sizes(row(out, "checkpoints")) == pytest.approx(expected, rel=0.3)


def test_a_run_begins_with_what_it_is_and_takes(finished_run):
    out = finished_run.out
    assert out.startswith("etpo on tic_tac_toe, tiny\n")
    assert row(out, "device").startswith("cpu, 32-true")
    assert "3 x 16 actions of at most 48 tokens" in row(out, "iterations")
    assert row(out, "folder").endswith(finished_run.folder.name)
    trained, total = re.fullmatch(
        r"([\d.]+)M trained of ([\d.]+)M in all", row(out, "parameters")
    ).groups()
    assert 0 < float(trained) < float(total)
    check_expected(out, finished_run.folder)


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (12_345, "12.3K"), (1_234_567, "1.23M"), (7e9, "7B")]
)
def test_numbers_of_parameters_are_short(number, text):
    assert short(int(number)) == text


def test_without_checkpoints_none_are_expected(tmp_path, fit, capsys):
    fit([StartReport(str(tmp_path), "iris", "some model")], 1)
    out = capsys.readouterr().out
    assert "some model" in out
    assert not re.search("^  checkpoints ", out, re.MULTILINE)
