"""What honest programs return, and the error texts of those that fail."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from etpo_sandbox import Sandbox, SandboxError, Split

from .conftest import GOOD_PROGRAM, N_FEATURES, N_TEST, make_splits

MODELS = {
    "logistic_regression": "linear_model.LogisticRegression()",
    "random_forest": "ensemble.RandomForestClassifier(n_estimators=30, n_jobs=-1)",
    "hist_gradient_boosting": "ensemble.HistGradientBoostingClassifier(max_iter=20)",
    "svc": "svm.SVC(probability=True)",
    "mlp": "neural_network.MLPClassifier(max_iter=40)",
    "stacking": "ensemble.StackingClassifier("
    "[('nb', naive_bayes.GaussianNB()), ('tree', tree.DecisionTreeClassifier())], n_jobs=2)",
    "pipeline": "pipeline.make_pipeline("
    "preprocessing.StandardScaler(), neighbors.KNeighborsClassifier(n_jobs=-1))",
    "k_means": "pipeline.make_pipeline("
    "cluster.KMeans(20, n_init=1), linear_model.LogisticRegression())",
    "grid_search": "model_selection.GridSearchCV("
    "linear_model.LogisticRegression(), {'C': [0.1, 1.0]}, n_jobs=2)",
}
IMPORTS = (
    "from sklearn import cluster, ensemble, linear_model, model_selection, naive_bayes, neighbors, "
    "neural_network, pipeline, preprocessing, svm, tree\n"
)


def model_program(model: str) -> str:
    return IMPORTS + f"def build_model(x_train, y_train):\n    return {model}.fit(x_train, y_train)"


def returning(value: str) -> str:
    return f"import numpy as np\ndef build_model(x_train, y_train):\n    return {value}"


def predicting(value: str, body: str = "pass") -> str:
    return (
        "import numpy as np\n"
        f"class Model:\n    {body}\n    def predict_proba(self, x):\n        return {value}\n"
        "def build_model(x_train, y_train):\n    return Model()"
    )


ERRORS = [
    ("x = 1", "NameError: name 'build_model' is not defined"),
    ("def build_model(x_train, y_train)\n    pass", "SyntaxError: expected ':' (line 1)"),
    (returning("None"), "AttributeError: 'NoneType' object has no attribute 'predict_proba'"),
    (
        returning("lambda x: x"),
        "AttributeError: 'function' object has no attribute 'predict_proba'",
    ),
    (returning("1 / 0"), "ZeroDivisionError: division by zero"),
    (returning("missing"), "NameError: name 'missing' is not defined"),
    (returning("[][0]"), "IndexError: list index out of range"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    (
        "from sklearn.ensemble import SVC",
        "ImportError: cannot import name 'SVC' from 'sklearn.ensemble' "
        "(sklearn/ensemble/__init__.py)",
    ),
    (
        "from json import nothing",
        "ImportError: cannot import name 'nothing' from 'json' (json/__init__.py)",
    ),
    ("import sys\nsys.exit(0)", "SystemExit: 0"),
    ("import os\nos._exit(0)", "RuntimeError: the program ended the process (exit status 0)"),
    (
        predicting("np.ones(len(x))"),
        f"ValueError: predict_proba returned shape ({N_TEST},), expected ({N_TEST}, 2)",
    ),
    (
        predicting("np.full((len(x), 2), None)"),
        "TypeError: predict_proba returned dtype object, not floats",
    ),
    (
        predicting("np.full((len(x), 2), np.nan)"),
        "ValueError: predict_proba returned NaN or infinite values",
    ),
    (
        predicting("np.full((len(x), 2), 1.5)"),
        "ValueError: predict_proba returned values outside 0 to 1",
    ),
]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_usual_models_give_probabilities(sandbox: Sandbox, model: str) -> None:
    splits, labels = make_splits(n_classes=3, n_splits=1)
    (outcome,) = sandbox.run([model_program(model)], splits, 3, seed=0)
    assert outcome.error is None
    (probabilities,) = outcome.probabilities
    assert probabilities.shape == (N_TEST, 3)
    assert (probabilities.argmax(axis=1) == labels[0]).mean() > 0.6
    assert outcome.seconds > 0


def test_result_equals_the_model_fitted_here(sandbox: Sandbox) -> None:
    splits, _ = make_splits()
    (outcome,) = sandbox.run([GOOD_PROGRAM], splits, 2, seed=0)
    for split, probabilities in zip(splits, outcome.probabilities, strict=True):
        model = LogisticRegression().fit(split.x_train, split.y_train)
        np.testing.assert_allclose(probabilities, model.predict_proba(split.x_test), atol=1e-9)


@pytest.mark.parametrize(("program", "error"), ERRORS, ids=[error for _, error in ERRORS])
def test_error_texts(sandbox: Sandbox, program: str, error: str) -> None:
    splits, _ = make_splits(n_splits=1)
    (outcome,) = sandbox.run([program], splits, 2, seed=0)
    assert (outcome.error, outcome.probabilities) == (error, None)


def test_rows_of_three_classes_must_sum_to_one(sandbox: Sandbox) -> None:
    splits, _ = make_splits(n_classes=3, n_splits=1)
    program = predicting("np.full((len(x), 3), 0.5)")
    (outcome,) = sandbox.run([program], splits, 3, seed=0)
    assert outcome.error == "ValueError: the rows of predict_proba do not sum to 1"


def test_a_class_missing_in_training_gets_a_zero_column(sandbox: Sandbox) -> None:
    splits, _ = make_splits(n_classes=3, n_splits=1)
    rows = splits[0].y_train != 1
    split = Split(splits[0].x_train[rows], splits[0].y_train[rows], splits[0].x_test)
    (outcome,) = sandbox.run([GOOD_PROGRAM], [split], 3, seed=0)
    (probabilities,) = outcome.probabilities
    assert (probabilities[:, 1] == 0).all()
    model = LogisticRegression().fit(split.x_train, split.y_train)
    expected = model.predict_proba(split.x_test)
    np.testing.assert_allclose(probabilities[:, [0, 2]], expected, atol=1e-9)


def test_columns_follow_the_classes_of_the_model(sandbox: Sandbox) -> None:
    splits, _ = make_splits(n_splits=1)
    program = predicting("np.tile([0.9, 0.1], (len(x), 1))", "classes_ = np.array([1, 0])")
    (outcome,) = sandbox.run([program], splits, 2, seed=0)
    assert outcome.probabilities[0][0].tolist() == [0.1, 0.9]


def test_error_text_is_one_printable_line_of_600_bytes(sandbox: Sandbox) -> None:
    splits, _ = make_splits(n_splits=1)
    program = "raise ValueError('\\x1b[31mred\\n\\0' + 'ä' * 10**6)"
    (outcome,) = sandbox.run([program], splits, 2, seed=0)
    assert outcome.error.startswith("ValueError:  [31mred  ää")
    assert outcome.error.isprintable()
    assert 500 < len(outcome.error.encode()) <= 600


def test_stops_at_the_first_split_that_fails(sandbox: Sandbox) -> None:
    splits, _ = make_splits()
    splits[1] = Split(splits[1].x_train[:50], splits[1].y_train[:50], splits[1].x_test)
    program = GOOD_PROGRAM.replace("    return", "    assert len(y_train) > 50, 'few'\n    return")
    seen = []
    outcomes = sandbox.run(
        [program, GOOD_PROGRAM], splits, 2, 0, lambda index, outcome: seen.append((index, outcome))
    )
    assert outcomes[0].error == "AssertionError: few"
    assert outcomes[0].probabilities is None
    assert len(outcomes[1].probabilities) == 2
    assert sorted(index for index, _ in seen) == [0, 1]
    assert all(outcomes[index] is outcome for index, outcome in seen)


def test_the_first_failing_split_counts_on_any_number_of_workers(sandbox: Sandbox) -> None:
    whole, _ = make_splits(n_splits=1)
    sizes = (50, 49, 40, 30, 20)
    splits = [Split(whole[0].x_train[:n], whole[0].y_train[:n], whole[0].x_test) for n in sizes]
    # the later a split, the sooner it fails
    body = "    import time\n    n = len(y_train)\n    time.sleep(max(0, n - 20) / 50)\n"
    program = GOOD_PROGRAM.replace("    return", f"{body}    assert n > 48, n\n    return")
    with Sandbox(workers=4) as wide:
        (spread,) = wide.run([program], splits, 2, 0)
    (one_by_one,) = sandbox.run([program], splits, 2, 0)
    assert spread.error == one_by_one.error == "AssertionError: 40"


def test_equal_inputs_give_equal_bytes_on_any_number_of_workers(sandbox: Sandbox) -> None:
    splits, _ = make_splits()
    noisy = predicting("np.random.default_rng().uniform(size=(len(x), 2))")
    hashed = predicting("np.full((len(x), 2), hash('text') % 1000 / 1000)")
    programs = [model_program(MODELS["random_forest"]), noisy, hashed, GOOD_PROGRAM]
    first = sandbox.run(programs, splits, 2, seed=3)
    again = sandbox.run(programs, splits, 2, seed=[3, 3, 3, 3])
    other_seed = sandbox.run(programs, splits, 2, seed=9)
    with Sandbox(workers=3) as wide:
        spread = wide.run(programs, splits, 2, seed=3)
    for one, two, three in zip(first, again, spread, strict=True):
        for a, b, c in zip(one.probabilities, two.probabilities, three.probabilities, strict=True):
            assert a.tobytes() == b.tobytes() == c.tobytes()
    for index in (0, 1):
        assert not np.array_equal(first[index].probabilities, other_seed[index].probabilities)
    assert not np.array_equal(first[1].probabilities[0], first[1].probabilities[1])


def test_programs_may_change_their_arrays(sandbox: Sandbox) -> None:
    splits, _ = make_splits(n_splits=1)
    before = splits[0].x_train.copy()
    program = GOOD_PROGRAM.replace("    return", "    x_train[:] *= 2\n    return")
    (outcome,) = sandbox.run([program], splits, 2, seed=0)
    assert outcome.error is None
    np.testing.assert_array_equal(splits[0].x_train, before)


def test_large_data_passes(sandbox: Sandbox) -> None:
    random = np.random.RandomState(0)
    x = random.normal(size=(40_000, N_FEATURES))
    split = Split(x, (x[:, 0] > 0).astype(np.int64), x)
    (outcome,) = sandbox.run([GOOD_PROGRAM], [split], 2, seed=0)
    assert outcome.probabilities[0].shape == (40_000, 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"level": "none"}, "level=none .*full, bubblewrap, unsafe"),
        ({"workers": 0}, "workers=0 .*1 or more"),
        ({"workers": 1.5}, "workers=1.5 .*1 or more"),
        ({"deadline": 0.0}, "deadline=0.0 .*0.1 or more"),
        ({"deadline": "soon"}, "deadline=soon .*0.1 or more"),
        ({"memory_mib": 100}, "memory_mib=100 .*512 or more"),
    ],
)
def test_bad_settings(setting: dict[str, object], message: str) -> None:
    with pytest.raises(SandboxError, match=message):
        Sandbox(**setting)


def test_the_package_does_not_import_etpo() -> None:
    code = "import sys, etpo_sandbox.server; sys.exit('etpo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
