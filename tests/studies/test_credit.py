"""The page of token credit, as a headless Chromium shows it."""

import json
import re
from itertools import pairwise

import pytest

from etpo.studies.pages.credit import PAGE_ITERATIONS, evenly_spaced, to_html, write_page

from .browser import CHROMIUM, Browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}


def row(iteration, number, **changes):
    """An action of three tokens; the advantages of iteration i are (i + 1) (1, -0.5, 0)."""
    size = iteration + 1
    return {
        "iteration": iteration,
        "env": number,
        "episode": 1,
        "attempt": 1,
        "prompt": "# write\ndef f():\n",
        "reward": 0.25 * size,
        "error": None,
        "text": ["  return é\n", "x", ""],
        "names": {"2": "</s>"},
        "probability": [0.5, 0.25, 1.0],
        "log_ratio": [-0.5, 0.5, 0.0],
        "entropy": [1.5, 2.5, 0.0],
        "kl": [0.125, 0.375, 0.0],
        "value": [0.1, 0.2, 0.3],
        "q": [0.6, 0.7, 0.8],
        "critic_advantage": [0.75 * size, -0.25 * size, 0.0],
        "sampled_advantage": [0.25 * size, -0.25 * size, 0.0],
        "advantage": [1.0 * size, -0.5 * size, 0.0],
        "alternatives": [[["\n", 0.25, -0.125]], [["y", 0.5, 0.4375], [" z", 0.125, 0.0]], []],
    } | changes


ROWS = [
    *(row(0, 0), row(0, 1, error="TypeError: no", reward=-1.0), row(0, 0, followed=0)),
    *(row(3, 0), row(3, 0, attempt=2, text=["a", "b", "c"], names={}), row(3, 0, followed=0)),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def show(browser, tmp_path):
    """show(rows, fragment): opens their page; it must not complain, and fetch nothing."""
    browser.errors.clear()
    browser.requests.clear()

    def opened(rows, fragment=""):
        file = tmp_path / "credit.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in rows))
        write_page(file, "ETPO, iris, seed 0")
        browser.open(f"file://{file.with_suffix('.html')}{fragment}")
        return browser

    yield opened
    assert browser.errors == []
    assert [a for a in browser.requests if not a.startswith(("file://", "about:"))] == []
    assert len(set(browser.requests)) == 1


def texts(browser, selector):
    return browser.value(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def painted(browser):
    """Class and strength of every token, in their order."""
    return browser.value(
        "[...document.querySelectorAll('.token')].map(e => [e.className,"
        "e.style.getPropertyValue('--strength')])"
    )


@needs_browser
def test_the_page_shows_the_actions_of_an_iteration(show):
    page = show(ROWS)
    assert texts(page, "h1") == ["Token credit"]
    assert texts(page, "h2") == [
        "Followed action",
        "Environment 0, episode 1",
        "Environment 1, episode 1",
    ]
    # blanks stay as they are, so that copied text is the program
    assert texts(page, ".tokens") == ["  return é\nx</s>"] * 3
    assert texts(page, ".token") == ["  return é\n", "x", "</s>"] * 3
    assert texts(page, ".head") == [
        "attempt 1reward 0.250no error",
        "attempt 1reward 0.250no error",
        "attempt 1reward −1.000failed",
    ]
    assert texts(page, ".error") == ["TypeError: no"]
    assert texts(page, "details pre") == ["# write\ndef f():\n"] * 3
    assert "Sampled in this iteration: 2 actions, mean reward −0.375, 1 failed." in texts(page, "p")
    assert page.value("document.querySelector('.tokens').offsetHeight") > 50  # two lines


@needs_browser
def test_colours_are_advantages_on_one_scale(show):
    page = show(ROWS)
    # 4 is the largest advantage of all iterations
    assert painted(page)[:3] == [["token plus", "25%"], ["token minus", "13%"], ["token", ""]]
    assert texts(page, ".least, .most") == ["−4.000", "+4.000"]
    page.value("location.hash = '#iteration=3'")
    assert painted(page)[:3] == [["token plus", "100%"], ["token minus", "50%"], ["token", ""]]
    choose(page, "scale", "one")
    page.value("location.hash = '#iteration=0'")
    assert painted(page)[:2] == [["token plus", "100%"], ["token minus", "50%"]]
    assert texts(page, ".least, .most") == ["−1.000", "+1.000"]
    choose(page, "colour", "log_ratio")
    assert [name for name, _ in painted(page)[:3]] == ["token minus", "token plus", "token"]
    assert texts(page, ".least, .most") == ["−0.500", "+0.500"]


def choose(page, name, value):
    page.value(
        f"(() => {{ const e = document.getElementById('{name}'); e.value = '{value}';"
        "e.dispatchEvent(new Event('change')); })()"
    )


def channels(page, selector):
    """Red, green, blue (0 to 255) of a token's background."""
    colour = page.value(f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")
    assert colour.startswith("color(srgb ")
    return [round(255 * float(x)) for x in re.findall(r"[\d.]+", colour)[:3]]


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_have_blue_for_plus_and_orange_for_minus(show, browser, theme):
    browser.theme(theme)
    page = show(ROWS, "#iteration=3")
    assert page.value("getComputedStyle(document.body).backgroundColor") == PAPER[theme]
    red, _, blue = channels(page, ".token.plus")
    assert blue > red + 80
    red, _, blue = channels(page, ".token.minus")
    assert red > blue + 80


@needs_browser
def test_the_slider_goes_over_the_recorded_iterations(show):
    page = show(ROWS)
    assert texts(page, "output") == ["0 of 3"]
    page.value("document.getElementById('iteration').focus()")
    page.press("ArrowRight")
    assert texts(page, "output") == ["3 of 3"]
    assert page.value("location.hash") == "#iteration=3"
    assert texts(page, ".token")[-3:] == ["a", "b", "c"]
    assert texts(page, ".head b") == ["attempt 1", "attempt 1", "attempt 2"]
    page.press("ArrowLeft")
    assert texts(page, "output") == ["0 of 3"]
    assert texts(show(ROWS, "#iteration=3"), "output") == ["3 of 3"]
    assert texts(show(ROWS, "#iteration=7"), "output") == ["0 of 3"]  # is not recorded


FIRST_TIP = [
    *(["advantage", "+1.000"], ["– from the critic", "+0.750"], ["– from the return", "+0.250"]),
    *(["Q", "0.600"], ["V", "0.100"], ["log π/π_ref", "−0.500"], ["entropy", "1.500"]),
    *(["KL(π ‖ π_ref)", "0.125"], ["token", "π", "Q"]),
    *(["··return·é\\n", "0.500", "0.600"], ["\\n", "0.250", "−0.125"]),
]


def tip(page):
    """The cells of the tooltip; None where it is hidden."""
    return page.value(
        "document.getElementById('tip').hidden ? null : "
        "[...document.querySelectorAll('#tip tr')].map(r => [...r.cells].map(c => c.textContent))"
    )


@needs_browser
def test_the_mouse_shows_the_numbers_of_a_token(show):
    page = show(ROWS)
    assert tip(page) is None
    page.hover(".token")
    assert tip(page) == FIRST_TIP
    page.hover(".token:nth-child(2)")
    assert tip(page)[-3:] == [
        *(["x", "0.250", "0.700"], ["y", "0.500", "0.438"], ["·z", "0.125", "0.000"])
    ]
    page.hover("h1")
    assert tip(page) is None


@needs_browser
def test_the_keyboard_shows_the_numbers_of_a_token(show):
    page = show(ROWS)
    page.value("document.getElementById('scale').focus()")
    page.press("Tab")
    assert tip(page) == FIRST_TIP
    assert page.value("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.press("ArrowRight")
    assert tip(page)[0] == ["advantage", "−0.500"]
    page.press("End")
    assert tip(page)[-1] == ["</s>", "1.000", "0.800"]
    page.press("Escape")
    assert tip(page) is None
    page.press("Tab")  # the prompt, then the next action
    page.press("Tab")
    assert tip(page) == FIRST_TIP


@needs_browser
@pytest.mark.parametrize(("block", "below"), [("center", True), ("end", False)])
def test_the_tooltip_lies_inside_the_window(show, block, below):
    page = show([row(0, 0, text=["x" * 120, "y", ""], prompt="p\n")] * 8)
    page.hover("section:last-of-type article:nth-of-type(4) .token:nth-child(2)", block)
    token, box = (
        page.value(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        for selector in ("[aria-describedby]", "#tip")
    )
    width, height = page.value("[document.documentElement.clientWidth, innerHeight]")
    assert token["left"] + box["width"] > width  # it has to give way
    assert box["left"] >= 0
    assert box["right"] <= width
    if below:
        assert token["bottom"] < box["top"] < box["bottom"] <= height
    else:
        assert 0 <= box["top"] < box["bottom"] < token["top"]


@needs_browser
def test_what_an_algorithm_lacks_is_omitted(show):
    lacking = ("q", "value", "critic_advantage", "sampled_advantage", "advantage")
    bare = {key: value for key, value in ROWS[0].items() if key not in lacking}
    bare["alternatives"] = [[["\n", 0.25]], [], []]
    page = show([bare])
    page.hover(".token")
    assert tip(page) == [
        *(["log π/π_ref", "−0.500"], ["entropy", "1.500"], ["KL(π ‖ π_ref)", "0.125"]),
        *(["token", "π"], ["··return·é\\n", "0.500"], ["\\n", "0.250"]),
    ]
    assert texts(page, "#colour option") == ["log π/π_ref"]
    assert painted(page)[0] == ["token minus", "100%"]
    partly = ROWS[0] | {"value": [0.1, None, None]}
    page = show([partly])
    page.hover(".token:nth-child(2)")
    assert "V" not in [cells[0] for cells in tip(page)]


HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<!--<script>\u2028{{ 7 * 7 }}</pre></article>&amp;\\u003c"
)


@needs_browser
def test_no_text_of_a_program_becomes_part_of_the_page(show):
    hostile = row(
        0,
        0,
        text=[HOSTILE, "x", ""],
        names={"2": HOSTILE},
        error=HOSTILE,
        prompt=HOSTILE,
        alternatives=[[[HOSTILE, 0.25, 0.5]], [], []],
    )
    page = show([hostile])
    page.hover(".token:nth-child(1)")
    assert texts(page, ".token") == [HOSTILE, "x", HOSTILE]
    assert texts(page, ".error") == texts(page, "details pre") == [HOSTILE]
    assert tip(page)[-1][0].startswith("</script><script>")
    assert page.value("window.hacked") is None
    assert page.value("document.querySelectorAll('main img, main script, #tip img').length") == 0


def test_a_hostile_title_is_text():
    page = to_html(ROWS, "<script>alert(1)</script>")
    assert "<script>alert" not in page
    assert page.count("<script") == 2
    assert page.count("</script") == 2


@needs_browser
def test_the_page_of_a_run(finished_run, browser):
    """Default settings but for sizes: every token of every line is there."""
    browser.errors.clear()
    lines = (finished_run.folder / "credit.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {line["iteration"] for line in rows} == {0, 1, 2}
    episodes = (finished_run.folder / "episodes.jsonl").read_text().splitlines()
    sampled = {json.loads(line)["action"] for line in episodes}
    for number in range(3):
        browser.open(f"file://{finished_run.folder / 'credit.html'}#iteration={number}")
        lines = [line for line in rows if line["iteration"] == number]
        assert len(lines) == 8 + 1
        assert texts(browser, "output") == [f"{number} of 2"]
        assert browser.value("document.querySelectorAll('.token').length") == sum(
            len(line["text"]) for line in lines
        )
        for line in lines:
            assert "".join(line["text"]) in sampled
        classes = [name for name, _ in painted(browser)]
        assert {"token plus", "token minus"} <= set(classes)
        browser.hover("section:nth-child(2) .token:nth-child(3)")
        assert tip(browser)[0][0] == "advantage"
    assert browser.errors == []


def test_a_long_run_keeps_the_page_small():
    assert evenly_spaced(range(3), 3) == [0, 1, 2]
    kept = evenly_spaced(range(400), PAGE_ITERATIONS)
    assert len(set(kept)) == PAGE_ITERATIONS
    assert (kept[0], kept[-1]) == (0, 399)
    steps = {after - before for before, after in pairwise(kept)}
    assert steps == {8, 9}
    page = to_html([row(i, 0) for i in range(60)], "t")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data) == PAGE_ITERATIONS
    assert "10 recorded iterations, evenly spaced, are omitted" in page
    assert "are omitted" not in to_html(ROWS, "t")


def test_without_rows_there_is_no_page(tmp_path):
    file = tmp_path / "credit.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    write_page(file, "t")
    assert file.with_suffix(".html").exists()
    file.write_text("")
    write_page(file, "t")
    assert not file.with_suffix(".html").exists()


@pytest.mark.parametrize(("advantage", "shown"), [([0.0, 0.0, None], True), ([0.0, -1e-3], False)])
def test_a_page_without_any_credit_explains_itself(advantage, shown):
    page = to_html([row(0, 0, advantage=advantage)], "title")
    assert ("No token has an advantage" in page) == shown
