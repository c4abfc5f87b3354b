"""`etpo-report`: tables and figures of a study, and errors of bad input."""

import csv
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from etpo import report

FILES = {
    "bars.png",
    "bars.svg",
    "curves.png",
    "curves.svg",
    "index.html",
    "excluded.csv",
    "runs.csv",
    "summary.csv",
    "table.csv",
    "table.md",
    "table.tex",
}


@pytest.fixture
def made(command, study, tmp_path):
    """made(*arguments): the folder of a report on the small study, and what was printed."""

    def call(*arguments: str, source: str = f"study={study}") -> tuple[Path, str]:
        out = tmp_path / "report"
        ended = command(report.main, source, f"out={out}", *arguments)
        assert ended.status == 0, ended.err
        return out, ended.out

    return call


def rows_of(file: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(data set, method) -> row of table.csv."""
    with file.open(newline="") as lines:
        return {(row["dataset"], row["method"]): row for row in csv.DictReader(lines)}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_table_of_a_small_study(made):
    out, printed = made()
    assert {file.name for file in out.iterdir()} == FILES
    rows = rows_of(out / "table.csv")
    assert list(rows) == [
        (dataset, method)
        for dataset in ("balance_scale", "tic_tac_toe", "all")
        for method in ("etpo", "ppo_kl")
    ]
    etpo, ppo = rows["tic_tac_toe", "etpo"], rows["tic_tac_toe", "ppo_kl"]
    # seed s has (1 - s / 100) times the curve 0, 0.5, 0.9, 1.0 or 0, 0.25, 0.5, 0.5
    assert (etpo["seeds"], ppo["seeds"]) == ("2", "3")
    assert float(etpo["final"]) == pytest.approx(0.6 * 0.995)
    assert float(etpo["final_low"]) == pytest.approx(0.6 * 0.99)
    assert float(etpo["final_high"]) == pytest.approx(0.6)
    assert float(ppo["final"]) == pytest.approx(0.3125 * 0.99)
    assert float(etpo["greedy"]) == pytest.approx(0.995 + 0.01)
    assert float(etpo["area"]) == pytest.approx(0.6 * 0.995)
    assert (etpo["steps_95"], etpo["reached_95"]) == ("40.0", "2")
    assert (etpo["steps_90"], etpo["reached_90"]) == ("35.0", "2")  # 30 and 40
    assert (ppo["steps_95"], ppo["reached_95"]) == ("40.0", "0")
    assert (etpo["best"], etpo["held_out_auc"], etpo["seconds"]) == ("1.0", "0.97", "12.25")
    overall = rows["all", "ppo_kl"]
    assert (overall["seeds"], overall["datasets"], overall["collapses"]) == ("6", "2", "0")
    assert overall["improves_area"] == overall["improves_area_high"] == "0.0"
    assert rows["all", "etpo"]["improves_area"] == ""
    for run in ("broken", "open", "stopped"):
        assert f"excluded: small/{run}" in printed
        assert f"excluded: small/{run}" in (out / "table.md").read_text()
    assert str(out) in printed
    assert "0.597 [0.594, 0.600]" in printed


def test_the_markdown_and_the_latex(made, tmp_path):
    file = tmp_path / "models.csv"
    file.write_text("name,rows,forest,forest_std\ntic_tac_toe,9,0.875,0.01\nother,9,0.1,0.01\n")
    out, _ = made(f"references={file}")
    text = (out / "table.md").read_text()
    assert "Scores: 0 is a reward of 0.000, 1 is 1.000." in text
    assert "| ppo_kl | 3 | 0.309 [0.306, 0.312] | 0.505 " in text
    assert "| - (0/3) | - (0/3) | 0 |" in text
    assert "| forest (reference) | - | - | - | - | 0.875 | - | - | - | - | - |" in text
    assert text.count("(reference)") == 1
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (12, 10)
    latex = (out / "table.tex").read_text()
    assert r"ppo\_kl & 3 & 0.309 [0.306, 0.312] & 0.505" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    for line in latex.splitlines():
        if line.endswith(r"\\") and not line.startswith(r"\multicolumn"):
            assert line.count("&") in (10, 8)


class Texts(HTMLParser):
    """The cells of every table of a page, the items of its lists, and what it refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows, self.items, self.tags, self.links, self.inside = [], [], Counter(), [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.inside = tag if tag in ("td", "th", "li", "small") else self.inside
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "li":
            self.items.append("")
        self.links += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "li":
            self.items[-1] += text
        elif self.inside:
            self.rows[-1][-1] += (" " if self.inside == "small" else "") + text


def test_the_page_has_the_content_of_the_markdown_and_no_other_files(made, study, write_run):
    overrides = ("algorithm=rloo", "environment.dataset=<b>&", "seed=0")
    write_run(study / "strange", overrides, (0.0, 0.5))
    out, _ = made()
    page = (out / "index.html").read_text()
    seen = Texts(page)
    markdown = (out / "table.md").read_text().splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in markdown if "|" in line]
    rows = [row for row in rows if set(row) != {"---"}]
    assert sorted(seen.rows) == sorted(rows)
    assert seen.items == [line[2:] for line in markdown if line.startswith("- ")]
    assert seen.items
    assert seen.tags["svg"] == 2
    assert not seen.links
    assert not seen.tags["b"]  # the data set's name is text
    assert not seen.tags["script"]
    assert "@import" not in page


def test_notes_list_what_is_not_comparable(made, study, write_run):
    overrides = ["algorithm=etpo", "environment.dataset=tic_tac_toe", "seed=2"]
    # moving means 0.9, 0.6: it fell, and it never had 0.95
    write_run(study / "third", overrides, [0.9, 0.9, 0.9, 0.0])
    write_run(study / "short", ["algorithm=poad", "seed=0"], [0.0, 0.5], best_reward=0.6)
    out, printed = made()
    row = rows_of(out / "table.csv")["tic_tac_toe", "etpo"]
    assert (row["reached_95"], row["collapses"]) == ("2", "1")
    text = (out / "table.md").read_text()
    assert "| ≥ 40 [40, 40] (2/3) |" in text
    assert "| poad | 1 | 0.250 | 0.510 | 0.600 |" in text  # one seed has no interval
    assert "tic_tac_toe: runs have 20 to 40 actions" in printed
    assert "poad and etpo were not run on the same data sets" in printed
    assert "ppo_kl and etpo" not in printed


def test_a_report_repeats_to_the_byte_and_from_its_own_numbers(made, command, study, tmp_path):
    out, _ = made()
    first = contents(out)
    assert contents(made()[0]) == first
    saved = tmp_path / "committed"
    saved.mkdir()
    for name in ("runs.csv", "summary.csv", "excluded.csv"):
        (saved / name).write_bytes(first[name])
    ended = command(report.main, f"runs={saved}")
    assert ended.status == 0, ended.err
    assert contents(saved) == first


@pytest.mark.slow
def test_a_study_adds_to_an_earlier_report(made, command, study, tmp_path):
    """As when the logs of the first runs stayed on another machine."""
    first = contents(made()[0])
    saved, elsewhere = tmp_path / "committed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    first_half, second_half = (sorted(study.glob("etpo*"))[i::2] for i in (0, 1))

    def move(runs, folder):
        return [run.rename(folder / run.name) for run in runs]

    moved = move(second_half, elsewhere)
    ended = command(report.main, f"study={study}", f"out={saved}")
    assert ended.status == 0, ended.err
    move(moved, study)
    move(first_half[:1], elsewhere)  # the others come twice
    ended = command(report.main, f"study={study}", f"runs={saved}")
    assert ended.status == 0, ended.err
    assert contents(saved) == first


def test_a_study_is_found_by_its_name_and_holds_its_report(command, study, tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    (logs / "train").mkdir(parents=True)
    study.parent.rename(logs / "train" / "multiruns")
    monkeypatch.chdir(tmp_path)
    ended = command(report.main, "study=small")
    assert ended.status == 0, ended.err
    assert (logs / "train" / "multiruns" / "small" / "table.md").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}  # no run folder of its own
    ended = command(report.main, "study=larger")
    assert ended.err.startswith("error: study=larger: no such folder")
    assert ended.err.endswith(": small\n")


def test_methods_are_compared_with_the_one_that_is_named(made):
    out, printed = made("compare_with=ppo_kl", "best_known={tic_tac_toe: 2.0}")
    rows = rows_of(out / "table.csv")
    assert next(iter(rows)) == ("balance_scale", "ppo_kl")
    assert rows["all", "etpo"]["improves_area"] == "1.0"
    assert "P(final above ppo_kl)" in printed
    halved = float(rows["tic_tac_toe", "etpo"]["area"])
    assert halved == pytest.approx(float(rows["balance_scale", "etpo"]["area"]) / 2, abs=1e-6)


def test_the_curves_show_the_methods_that_are_named(made):
    out, _ = made("curves_of=[ppo_kl]")
    text = (out / "curves.svg").read_text()
    assert "<!-- ppo_kl" in text
    assert "<!-- etpo" not in text
    assert "<!-- etpo" in (out / "bars.svg").read_text()
    assert ("tic_tac_toe", "etpo") in rows_of(out / "table.csv")


def test_the_figures_show_every_method(made):
    out, _ = made()
    for name in ("curves", "bars"):
        pixels = imread(out / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 300
        assert pixels[0, 0].tolist() == [1, 1, 1]
        assert (pixels[..., 2] > pixels[..., 0] + 0.3).mean() > 0.001  # blue: etpo
        assert (pixels[..., 0] > pixels[..., 2] + 0.3).mean() > 0.001  # orange: ppo_kl
        text = (out / f"{name}.svg").read_text()
        for word in ("etpo", "ppo_kl", "balance_scale", "tic_tac_toe"):
            assert f"<!-- {word}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "study=null"),
        (("study={study}", "runs={study}"), "runs={study}: no runs.csv"),
        (("study=/nowhere",), "study=/nowhere: no such folder"),
        (("study=[{study},{empty}]",), "out=null"),
        (("study={empty}",), "study=empty"),
        (("runs={empty}",), "runs={empty}: no runs.csv"),
        (("runs={wrong}",), "runs={wrong}: runs.csv lacks the column method"),
        (("study={study}", "out={file}"), "out={file}"),
        (("study={study}", "compare_with=ppo"), "compare_with=ppo: allowed: etpo, ppo_kl"),
        (("study={study}", "curves_of=[etpo,ppo]"), "curves_of=ppo: allowed methods: etpo, ppo_kl"),
        (("study={study}", "references=none.csv"), "references=none.csv"),
        (("study={study}", "references={file}"), "references={file}"),
        (("study={study}", "best_known={{cmc: 1}}"), "best_known.cmc=1"),
        (("study={study}", "best_known={{tic_tac_toe: x}}"), "best_known.tic_tac_toe=x"),
        (("study={study}", "best_known=1"), "best_known=1"),
        (("study={study}", "nope=1"), "nope"),
        (("{study}",), "small"),
    ],
)
def test_bad_input_is_one_line(command, study, tmp_path, arguments, words):
    places = {"study": study, "empty": tmp_path / "empty", "wrong": tmp_path / "wrong"}
    places["file"] = tmp_path / "file.csv"
    places["empty"].mkdir()
    places["wrong"].mkdir()
    (places["wrong"] / "runs.csv").write_text("dataset,seed\nx,0\n")
    places["file"].write_text("name,forest\ntic_tac_toe,0.5\n")
    before = set(tmp_path.rglob("*"))
    ended = command(report.main, *(a.format(**places) for a in arguments))
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert words.format(**places) in ended.err
    assert set(tmp_path.rglob("*")) == before
