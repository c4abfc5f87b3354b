import pytest

from etpo.errors import ConfigError
from etpo_sandbox import Outcome
from etpo_tasks.data_science.datasets import load_dataset
from etpo_tasks.data_science.score_cache import ScoreCache
from etpo_tasks.data_science.scoring import ProgramScorer


class CountingSandbox:
    """Fails every program with the text after its `#`, and keeps what it was given."""

    deadline, memory_mib = 10.0, 2048

    def __init__(self):
        self.ran = []

    def start(self):
        pass

    def run(self, programs, splits, n_classes, seeds, on_result=None):
        self.ran += programs
        return [Outcome(None, program.partition("#")[2], 0.0) for program in programs]


@pytest.fixture
def scorer(tmp_path):
    """scorer(**settings): one that keeps its scores in tmp_path/cache/scores.sqlite."""
    dataset = load_dataset("iris")

    def make(**settings):
        path = str(tmp_path / "cache" / "scores.sqlite")
        return ProgramScorer(dataset, CountingSandbox(), **{"cache_path": path} | settings)

    return make


def test_scores_are_exact_and_separate_per_task(tmp_path):
    file = tmp_path / "new folder" / "scores.sqlite"
    scores = {"a": (1 / 3, None), "b": (-1.0, "ValueError: no"), "\ud800": (0.1 + 0.2, None)}
    ScoreCache(file, {"data": "x"}, 10_000).put(scores)
    assert ScoreCache(file, {"data": "x"}, 10_000).get([*scores, "unknown"]) == scores
    assert ScoreCache(file, {"data": "y"}, 10_000).get(scores) == {}


def test_the_first_score_of_a_program_stays(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite", {}, 10_000)
    cache.put({"a": (0.5, None)})
    cache.put({"a": (0.75, None), "b": (0.25, None)})
    assert cache.get(["a", "b"]) == {"a": (0.5, None), "b": (0.25, None)}


def test_beyond_its_size_the_oldest_scores_go(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite", {}, 3)
    for program in "abcd":
        cache.put({program: (0.5, None)})
    cache.put({"b": (0.5, None)})  # known: takes no new place
    assert sorted(cache.get("abcd")) == ["b", "c", "d"]
    cache.put(dict.fromkeys("efghi", (0.5, None)))
    assert sorted(cache.get("abcdefghi")) == ["g", "h", "i"]


def test_many_programs_are_looked_up_at_once(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite", {}, 10_000)
    scores = {f"program {number}": (float(number), None) for number in range(2000)}
    cache.put(scores)
    assert cache.get(scores) == scores


def test_another_run_scores_nothing_again(scorer):
    first, second = scorer(), scorer()
    one = first.score(["x#ValueError: 1", "y#ValueError: 2", "x#ValueError: 1"])
    two = second.score(["x#ValueError: 1", "y#ValueError: 2"])
    assert first.sandbox.ran == ["x#ValueError: 1", "y#ValueError: 2"]
    assert second.sandbox.ran == []
    assert [score.cached for score in one] == [False, False, True]
    assert [score.cached for score in two] == [True, True]
    assert [score[:2] for score in two] == [score[:2] for score in one[:2]]


@pytest.mark.parametrize("change", [{"split_seed": 1}, {"n_splits": 3}, {"protocol": "paper"}])
def test_other_tasks_share_no_scores(scorer, change):
    scorer().score(["x#ValueError: 1"])
    other = scorer(**change)
    other.score(["x#ValueError: 1"])
    assert other.sandbox.ran == ["x#ValueError: 1"]


def test_what_ran_out_of_time_is_tried_again_by_the_next_run(scorer):
    late = "x#TimeoutError: more than 10 CPU seconds"
    first = scorer()
    first.score([late])
    first.score([late])
    assert first.sandbox.ran == [late]
    second = scorer()
    second.score([late])
    assert second.sandbox.ran == [late]


def test_without_a_path_nothing_is_written(scorer, tmp_path):
    scorer(cache_path=None).score(["x#ValueError: 1"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind_is_bad_input(scorer, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but long enough not to look empty" * 20)
    with pytest.raises(ConfigError, match=r"environment\.score_cache=.*notes\.txt: .*allowed is"):
        scorer(cache_path=str(file))
