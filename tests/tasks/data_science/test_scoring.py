import csv

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from etpo_tasks.data_science.datasets import load_dataset
from etpo_tasks.data_science.encoding import encode
from etpo_tasks.data_science.scoring import (
    ProgramScorer,
    draw_halves,
    impute,
    roc_auc,
)

pytestmark = pytest.mark.filterwarnings("ignore:lbfgs failed to converge")

LOGISTIC = """
from sklearn.linear_model import LogisticRegression
def build_model(x_train, y_train):
    return LogisticRegression(max_iter=1000).fit(x_train, y_train)
"""
BOOSTING = """
from sklearn.ensemble import HistGradientBoostingClassifier
def build_model(x_train, y_train):
    return HistGradientBoostingClassifier(random_state=0).fit(x_train, y_train)
"""
BROKEN = "def build_model(x_train, y_train):\n    return 1 / 0\n"
RANDOM = """
import numpy as np
class Model:
    def predict_proba(self, x):
        p = np.random.rand(len(x))
        return np.stack([1 - p, p], axis=1)
def build_model(x_train, y_train):
    return Model()
"""
SEARCH = """
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
def build_model(x_train, y_train):
    return GridSearchCV(LogisticRegression(), {"C": [1.0]}, cv=2).fit(x_train, y_train)
"""


def tiny(counts, missing=(), columns=1):
    """A data set whose class c has counts[c] rows; feature 0 is the row number."""
    labels = [f"class{c}" for c, count in enumerate(counts) for _ in range(count)]
    rows = [
        ("" if i in missing else str(i), *["7"] * (columns - 1), label)
        for i, label in enumerate(labels)
    ]
    names = (*[f"f{j}" for j in range(columns)], "y")
    return encode("tiny", pd.DataFrame(rows, columns=names), "y", "impute")


def test_impute_by_hand():
    nan = np.nan
    x_train = np.array(
        [[1.0, 2.0, nan], [nan, 2.0, nan], [4.0, nan, nan], [10.0, 0.0, nan], [nan, 1.0, nan]]
    )
    x_test = np.array([[nan, nan, nan], [100.0, 5.0, 3.0]])
    train, test = impute(x_train, x_test, np.array([False, True, False]))
    # the median of 1, 4, 10 is 4 (mean 5); category 2 is the most frequent (median 1.5); an empty
    # column becomes 0
    np.testing.assert_array_equal(train, [[1, 2, 0], [4, 2, 0], [4, 2, 0], [10, 0, 0], [4, 1, 0]])
    np.testing.assert_array_equal(test, [[4, 2, 0], [100, 5, 3]])
    assert np.isnan(x_train).any()


def test_roc_auc_by_hand():
    y = np.array([0, 1, 0, 1])
    # positives .4, .9 against negatives .1, .5: 3 of 4 pairs in order
    p = np.array([0.1, 0.4, 0.5, 0.9])
    assert roc_auc(y, np.stack([1 - p, p], axis=1)) == 0.75
    # a difference below 1e-9 is a tie: half a pair
    p = np.array([0.5, 0.5 + 1e-11])
    assert roc_auc(np.array([0, 1]), np.stack([1 - p, p], axis=1)) == 0.5


def test_roc_auc_of_three_classes_is_one_versus_one():
    y = np.array([0, 0, 1, 1, 2, 2])
    p = np.array(
        [[0.6, 0.2, 0.2], [0.4, 0.5, 0.1], [0.2, 0.6, 0.2], [0.1, 0.8, 0.1], [0, 0, 1], [0, 0, 1]]
    )
    # every pair of classes is in order under both of its columns
    assert roc_auc(y, p) == 1.0
    swapped = p[[2, 1, 0, 3, 4, 5]]
    # classes 0 and 1 by column 0: (.2, .4) against (.6, .1) 2 of 4; by column 1: (.6, .5) against
    # (.2, .8), class 1 above 0 in 2 of 4; the two pairs with class 2 stay perfect
    assert roc_auc(y, swapped) == pytest.approx((0.5 + 1 + 1) / 3)
    with pytest.raises(ValueError, match=r"sum up to 1"):
        roc_auc(y, p * 0.5)


def test_held_out_rows_reach_no_reward_program(sandbox):
    dataset = tiny([60, 40])
    scorer = ProgramScorer(dataset, sandbox, protocol="held_out", split_seed=3)
    scorer.score([LOGISTIC])
    held_out = set(scorer.held_out_rows.tolist())
    assert len(held_out) == 40
    assert np.bincount(dataset.target[scorer.held_out_rows]).tolist() == [24, 16]  # stratified
    assert len(sandbox.splits) == 5
    for split in sandbox.splits:
        train, test = set(split.x_train[:, 0].astype(int)), set(split.x_test[:, 0].astype(int))
        assert len(train) == len(test) == 30
        assert train.isdisjoint(test)
        assert train | test == set(scorer.reward_rows.tolist())
        assert (train | test).isdisjoint(held_out)
        assert (split.y_train == dataset.target[split.x_train[:, 0].astype(int)]).all()


def test_paper_protocol_uses_all_rows(sandbox):
    scorer = ProgramScorer(tiny([60, 40]), sandbox, protocol="paper", n_splits=3)
    scorer.score([LOGISTIC])
    assert [len(split.x_train) for split in sandbox.splits] == [50] * 3
    assert scorer.n_train_rows == 50
    assert scorer.held_out([LOGISTIC]) is None


def test_split_seed_draws_the_rows(sandbox):
    def rows(split_seed):
        scorer = ProgramScorer(tiny([60, 40]), sandbox, split_seed=split_seed)
        return scorer.held_out_rows, scorer.folds[0][0].x_train

    for same, other in zip(rows(1), rows(1), strict=True):
        np.testing.assert_array_equal(same, other)
    assert any((a != b).any() for a, b in zip(rows(1), rows(2), strict=True))


def test_splits_are_random_and_hold_every_class():
    target = np.array([0] * 200 + [1] * 8)
    random = np.random.RandomState(0)
    counts = {
        tuple(np.bincount(target[half])[1] for half in draw_halves(np.arange(208), target, random))
        for _ in range(60)
    }
    assert len(counts) > 3  # stratified halves would always have 4 and 4
    assert all(min(pair) >= 1 for pair in counts)


def test_many_rare_classes_fall_back_to_stratified_halves():
    target = np.repeat(np.arange(15), 2)  # a random half hardly ever has them all
    train, test = draw_halves(np.arange(30), target, np.random.RandomState(0))
    assert sorted(target[train]) == sorted(target[test]) == list(range(15))


@pytest.mark.parametrize("counts", [[4, 4], [4, 5, 6, 7], [4] * 20, [400, 4]])
def test_the_smallest_class_allowed_can_be_split(counts, sandbox):
    for split_seed in range(5):
        scorer = ProgramScorer(tiny(counts), sandbox, split_seed=split_seed)
        labels = [y for split, y_test in scorer.folds for y in (split.y_train, y_test)]
        labels.append(scorer.dataset.target[scorer.held_out_rows])
        assert all(len(np.unique(label)) == len(counts) for label in labels)


def test_missing_cells_are_filled_from_the_training_rows_of_the_split(sandbox):
    dataset = tiny([50, 50], missing=range(20, 60))
    scorer = ProgramScorer(dataset, sandbox)
    for split, _ in scorer.folds:
        assert not np.isnan(split.x_train).any()
        assert not np.isnan(split.x_test).any()
    fills = {float(np.median(split.x_train)) for split, _ in scorer.folds}
    assert len(fills) > 1  # one median per split, not one of the whole table


def test_equal_programs_run_once(sandbox):
    scorer = ProgramScorer(load_dataset("wine"), sandbox)
    calls = []
    first = scorer.score(
        [LOGISTIC, BROKEN, LOGISTIC], lambda done, total: calls.append((done, total))
    )
    assert [program for program, _ in sandbox.runs] == [LOGISTIC, BROKEN]
    assert [score.cached for score in first] == [False, False, True]
    assert calls == [(1, 2), (2, 2)]
    second = scorer.score([BROKEN, LOGISTIC])
    assert len(sandbox.runs) == 2
    assert [score.cached for score in second] == [True, True]
    assert [score.reward for score in second] == [first[1].reward, first[0].reward]


def test_what_works_runs_once_under_all_names(sandbox):
    def named(name, last):
        line = f"    {name} = LogisticRegression(max_iter=1000)\n"
        return LOGISTIC.replace(
            "    return", f"{line}    {name}.fit(x_train, y_train)\n    return {last} #"
        )

    works, twin = named("model", "model"), named("clf", "clf")
    fails, failing_twin = named("model", "model.nothing"), named("clf", "clf.nothing")
    scorer = ProgramScorer(load_dataset("wine"), sandbox)
    calls = []
    scores = scorer.score(
        [works, fails, twin, failing_twin], lambda done, total: calls.append((done, total))
    )
    assert [program for program, _ in sandbox.runs] == [works, fails, failing_twin]
    assert [score.cached for score in scores] == [False, False, True, False]
    assert scores[2].reward == scores[0].reward > 0.9
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert scorer.program_seed(works) == scorer.program_seed(twin) != scorer.program_seed(fails)
    other = ProgramScorer(load_dataset("wine"), sandbox)
    other.load_scores({works: (0.25, None)})
    assert other.score([twin])[0] == (0.25, None, True)


def test_scores_that_another_scorer_knows_run_nothing_again(sandbox):
    dataset = load_dataset("wine")
    first, second = ProgramScorer(dataset, sandbox), ProgramScorer(dataset, sandbox)
    scores = first.score([LOGISTIC, BROKEN])
    second.load_scores(first.known_scores())
    sandbox.runs.clear()
    again = second.score([BROKEN, LOGISTIC, RANDOM])
    assert [program for program, _ in sandbox.runs] == [RANDOM]
    assert [score.cached for score in again] == [True, True, False]
    assert [score[:2] for score in again[:2]] == [scores[1][:2], scores[0][:2]]
    second.load_scores({RANDOM: (0.25, None), SEARCH: (0.75, None)})
    assert second.known_scores()[RANDOM] == again[2][:2]  # what was scored here stays
    assert second.score([SEARCH])[0] == (0.75, None, True)


def test_failures_score_minus_one_with_their_error(sandbox):
    unnormalised = RANDOM.replace("[1 - p, p]", "[p, p, p]")
    broken, unnormalised = ProgramScorer(load_dataset("wine"), sandbox).score(
        [BROKEN, unnormalised]
    )
    assert broken == (-1.0, "ZeroDivisionError: division by zero", False)
    assert unnormalised.reward == -1.0
    assert unnormalised.error.startswith("ValueError: ")


def test_a_reward_depends_on_neither_order_nor_neighbours(sandbox):
    dataset = load_dataset("breast_cancer")
    other = RANDOM + "# another text\n"
    a, b = ProgramScorer(dataset, sandbox).score([RANDOM, other])
    b_again, _, a_again = ProgramScorer(dataset, sandbox).score([other, LOGISTIC, RANDOM])
    assert a == a_again
    assert b == b_again
    assert a.reward != b.reward  # seeds follow the text
    one, two = (ProgramScorer(dataset, sandbox, split_seed=3) for _ in range(2))
    assert one.score([RANDOM]) == two.score([RANDOM])
    two.split_seed = 4  # the same rows, another seed for the program
    assert two.program_seed(RANDOM) != one.program_seed(RANDOM)


def test_held_out_fits_on_all_reward_rows(sandbox):
    dataset = tiny([60, 40])
    scorer = ProgramScorer(dataset, sandbox)
    score, broken, again = scorer.held_out([LOGISTIC, BROKEN, LOGISTIC])
    (split,) = sandbox.splits
    assert split.x_train[:, 0].tolist() == scorer.reward_rows.tolist()
    assert split.x_test[:, 0].tolist() == scorer.held_out_rows.tolist()
    # the class is a threshold on the one feature: a fitted line orders the rows perfectly
    assert score.reward == again.reward == 1.0
    assert broken.reward == -1.0
    assert len(sandbox.runs) == 2


def test_grid_search_is_refused_under_the_papers_protocol_only(sandbox):
    dataset = load_dataset("wine")
    (refused,) = ProgramScorer(dataset, sandbox, protocol="paper").score([SEARCH])
    assert refused == (-1.0, "RuntimeError: GridSearchCV is not allowed", False)
    assert sandbox.runs == []
    (allowed,) = ProgramScorer(dataset, sandbox).score([SEARCH])
    assert allowed.error is None


def baseline(name, data_dir):
    with (data_dir / "baselines.csv").open(newline="") as lines:
        return {row["name"]: row for row in csv.DictReader(lines)}[name]


@pytest.mark.parametrize(
    ("name", "model", "column"),
    [
        ("cmc", LogisticRegression(max_iter=1000), "logistic_regression"),
        ("cmc", HistGradientBoostingClassifier(random_state=0), "hist_gradient_boosting"),
        (
            "health_insurance",
            HistGradientBoostingClassifier(random_state=0),
            "hist_gradient_boosting",
        ),
        ("credit_g", HistGradientBoostingClassifier(random_state=0), "hist_gradient_boosting"),
    ],
)
def test_baselines_on_their_own_splits(name, model, column, data_dir):
    """Encoding and ROC AUC reproduce baselines.csv to three digits at least."""
    dataset = load_dataset(name, data_dir=str(data_dir), missing="drop")
    aucs = []
    for i in range(5):
        x_train, x_test, y_train, y_test = train_test_split(
            dataset.features, dataset.target, test_size=0.5, random_state=i
        )
        aucs.append(roc_auc(y_test, model.fit(x_train, y_train).predict_proba(x_test)))
    assert np.mean(aucs) == pytest.approx(float(baseline(name, data_dir)[column]), abs=5e-4)


@pytest.mark.parametrize(
    ("program", "column"), [(LOGISTIC, "logistic_regression"), (BOOSTING, "hist_gradient_boosting")]
)
def test_tic_tac_toe_scores_are_near_the_baselines(program, column, data_dir, sandbox):
    """baselines.csv has five other 50/50 splits of the same rows, in another order.

    Both means have a standard error of std / sqrt(5), so they differ by less than
    3 * sqrt(2 / 5) * std; the std is itself an estimate from five values, hence the 0.005.
    """
    row = baseline("tic_tac_toe", data_dir)
    scorer = ProgramScorer(load_dataset("tic_tac_toe"), sandbox, protocol="paper")
    tolerance = 3 * np.sqrt(2 / 5) * float(row[f"{column}_std"]) + 0.005
    assert scorer.score([program])[0].reward == pytest.approx(float(row[column]), abs=tolerance)
