"""The classifiers of the grammar: modules, settings and typical mistakes.

A value that is listed n times is n times as likely. Strings in `settings` and `wrong_values` are
Python source text.
"""

from typing import NamedTuple


class Estimator(NamedTuple):
    """One scikit-learn classifier.

    Attributes:
        weight: Relative frequency in ordinary programs.
        strong_weight: Relative frequency in improved programs.
        settings: keyword -> valid values.
        required: Arguments that `predict_proba` needs.
        misspelt: keyword -> misspelt name.
        wrong_values: keyword -> (bad value, constraint in scikit-learn's error).
        removed: Arguments of older releases.
        wrong_modules: Modules without this class.
        fit_owner: Class name in Python's error when `fit` lacks an argument.
        mistaken_for: Similar classifier (module, name) without `predict_proba`.
        argument_counts: Relative frequency of 0, 1, 2, ... settings in one program.
    """

    name: str
    module: str
    weight: float
    strong_weight: float
    settings: dict[str, tuple[str, ...]]
    required: tuple[tuple[str, str], ...] = ()
    misspelt: dict[str, str] = {}
    wrong_values: dict[str, tuple[str, str]] = {}
    removed: tuple[tuple[str, str], ...] = ()
    wrong_modules: tuple[str, ...] = ()
    fit_owner: str = ""
    mistaken_for: tuple[str, str] | None = None
    argument_counts: tuple[int, ...] = (35, 35, 23, 7)


POSITIVE_INT = "an int in the range [1, inf)"
OLD_MAX_FEATURES = (
    "'auto'",
    f"{POSITIVE_INT}, a float in the range (0.0, 1.0], a str among {{'sqrt', 'log2'}} or None",
)
TREE_CRITERION = ("'mse'", "a str among {'log_loss', 'entropy', 'gini'}")
SHALLOW_TREE = "DecisionTreeClassifier(max_depth=3)"
SEEDS = ("0", "42")

FOREST_SETTINGS = {
    "n_estimators": ("10", "10", "20", "50", "100"),
    "max_depth": ("2", "3", "3", "4", "5", "10", "None"),
    "min_samples_leaf": ("5", "10", "20", "2"),
    "max_features": ("'sqrt'", "'log2'", "None", "1"),
    "random_state": SEEDS,
}
FOREST_MISTAKES = {
    "misspelt": {"n_estimators": "n_estimator", "max_depth": "depth", "random_state": "seed"},
    "wrong_values": {"max_features": OLD_MAX_FEATURES, "criterion": TREE_CRITERION},
    "removed": (("min_impurity_split", "0.1"),),
    "wrong_modules": ("tree", "ensembles", "forest"),
    "fit_owner": "BaseForest",
}

ESTIMATORS = (
    Estimator(
        "LogisticRegression",
        "linear_model",
        11,
        2,
        {
            "C": ("1.0", "0.1", "0.01", "10", "0.001"),
            "max_iter": ("1000", "200", "500"),
            "solver": ("'lbfgs'", "'liblinear'", "'saga'"),
            "random_state": SEEDS,
        },
        misspelt={"max_iter": "max_iters", "C": "c", "solver": "solvers"},
        wrong_values={
            "C": ("0", "a float in the range (0.0, inf]"),
            "solver": (
                "'adam'",
                "a str among {'lbfgs', 'liblinear', 'newton-cholesky', 'newton-cg', 'sag', 'saga'}",
            ),
        },
        removed=(("normalize", "True"),),
        wrong_modules=("linear_models", "svm", "logistic"),
        fit_owner="LogisticRegression",
        mistaken_for=("linear_model", "RidgeClassifier"),
    ),
    Estimator(
        "DecisionTreeClassifier",
        "tree",
        14,
        2,
        {
            "max_depth": ("1", "2", "2", "3", "3", "5", "10"),
            "min_samples_leaf": ("5", "10", "50"),
            "criterion": ("'gini'", "'entropy'"),
            "max_leaf_nodes": ("3", "10", "20"),
            "random_state": SEEDS,
        },
        misspelt={"max_depth": "depth", "min_samples_leaf": "min_leaf", "random_state": "seed"},
        wrong_values={"max_features": OLD_MAX_FEATURES, "criterion": TREE_CRITERION},
        removed=(("presort", "True"), ("min_impurity_split", "0.1")),
        wrong_modules=("trees", "ensemble", "decision_tree"),
        fit_owner="DecisionTreeClassifier",
    ),
    Estimator("RandomForestClassifier", "ensemble", 10, 10, FOREST_SETTINGS, **FOREST_MISTAKES),
    Estimator("ExtraTreesClassifier", "ensemble", 6, 6, FOREST_SETTINGS, **FOREST_MISTAKES),
    Estimator(
        "GradientBoostingClassifier",
        "ensemble",
        9,
        16,
        {
            "n_estimators": ("200", "200", "200", "200", "150", "5"),
            "max_depth": ("4", "4", "4", "5", "5", "1"),
            "learning_rate": ("0.2", "0.2", "0.2", "0.3", "0.001"),
        },
        misspelt={"n_estimators": "n_estimator", "learning_rate": "lr", "max_depth": "depth"},
        wrong_values={
            "loss": ("'deviance'", "a str among {'log_loss', 'exponential'}"),
            "max_features": OLD_MAX_FEATURES,
        },
        removed=(("presort", "True"),),
        wrong_modules=("boosting", "tree", "ensembles"),
        fit_owner="BaseGradientBoosting",
        argument_counts=(6, 44, 38, 12),
    ),
    Estimator(
        "HistGradientBoostingClassifier",
        "ensemble",
        9,
        16,
        {
            "max_iter": ("200", "200", "200", "200", "150", "1"),
            "min_samples_leaf": ("5", "5", "5", "10", "10", "100"),
            "learning_rate": ("0.2", "0.2", "0.2", "0.3", "0.001"),
        },
        misspelt={"max_iter": "n_estimators", "learning_rate": "lr", "min_samples_leaf": "leaf"},
        wrong_values={
            "loss": (
                "'binary_crossentropy'",
                "a str among {'log_loss'} or an instance of 'sklearn._loss.loss.BaseLoss'",
            ),
        },
        removed=(("subsample", "0.8"),),
        wrong_modules=("boosting", "experimental", "ensembles"),
        fit_owner="BaseHistGradientBoosting",
        argument_counts=(6, 44, 38, 12),
    ),
    Estimator(
        "AdaBoostClassifier",
        "ensemble",
        6,
        7,
        {
            "n_estimators": ("10", "20", "50", "100"),
            "learning_rate": ("0.1", "0.5", "1.0"),
            "estimator": (SHALLOW_TREE,),
            "random_state": SEEDS,
        },
        misspelt={"n_estimators": "n_estimator", "learning_rate": "lr"},
        wrong_values={"n_estimators": ("0", POSITIVE_INT)},
        removed=(("base_estimator", SHALLOW_TREE), ("max_depth", "3")),
        wrong_modules=("boosting", "ensembles"),
        fit_owner="BaseWeightBoosting",
    ),
    Estimator(
        "BaggingClassifier",
        "ensemble",
        4,
        5,
        {
            "n_estimators": ("5", "10", "20", "50"),
            "max_samples": ("0.1", "0.5", "0.8"),
            "estimator": (SHALLOW_TREE,),
            "random_state": SEEDS,
        },
        misspelt={"n_estimators": "n_estimator", "max_samples": "samples"},
        wrong_values={"n_estimators": ("0", POSITIVE_INT)},
        removed=(("base_estimator", SHALLOW_TREE), ("max_depth", "3")),
        wrong_modules=("bagging", "ensembles"),
        fit_owner="BaseBagging",
    ),
    Estimator(
        "KNeighborsClassifier",
        "neighbors",
        11,
        4,
        {
            "n_neighbors": ("1", "3", "5", "7", "10", "15", "50"),
            "weights": ("'uniform'", "'distance'"),
            "p": ("1", "2"),
        },
        misspelt={"n_neighbors": "neighbors", "weights": "weight"},
        wrong_values={
            "n_neighbors": ("0", f"{POSITIVE_INT} or None"),
            "weights": ("'distances'", "a str among {'uniform', 'distance'}, a callable or None"),
        },
        removed=(("k", "5"),),
        wrong_modules=("neighbours", "knn", "cluster"),
        fit_owner="KNeighborsClassifier",
    ),
    Estimator(
        "GaussianNB",
        "naive_bayes",
        8,
        1,
        {"var_smoothing": ("1e-9", "1e-6", "1e-3", "0.1")},
        misspelt={"var_smoothing": "smoothing"},
        removed=(("alpha", "1.0"),),
        wrong_modules=("bayes", "linear_model", "gaussian"),
        fit_owner="GaussianNB",
    ),
    Estimator(
        "SVC",
        "svm",
        12,
        8,
        {
            "C": ("0.01", "0.1", "1.0", "10", "100"),
            "kernel": ("'linear'", "'rbf'", "'rbf'", "'poly'", "'sigmoid'"),
            "gamma": ("'scale'", "0.01", "0.001", "0.1"),
            "random_state": SEEDS,
        },
        required=(("probability", "True"),),
        misspelt={"kernel": "kernal", "gamma": "gama", "C": "c"},
        wrong_values={
            "kernel": (
                "'gaussian'",
                "a str among {'linear', 'precomputed', 'rbf', 'poly', 'sigmoid'} or a callable",
            ),
        },
        removed=(("n_jobs", "-1"),),
        wrong_modules=("svc", "linear_model"),
        fit_owner="BaseLibSVM",
        mistaken_for=("svm", "LinearSVC"),
    ),
    Estimator(
        "LinearDiscriminantAnalysis",
        "discriminant_analysis",
        5,
        1,
        {"solver": ("'svd'", "'lsqr'"), "tol": ("1e-4", "1e-3")},
        misspelt={"solver": "solvers"},
        wrong_values={"solver": ("'lbfgs'", "a str among {'svd', 'eigen', 'lsqr'}")},
        removed=(("max_iter", "200"),),
        wrong_modules=("lda", "linear_model"),
        fit_owner="LinearDiscriminantAnalysis",
    ),
    Estimator(
        "QuadraticDiscriminantAnalysis",
        "discriminant_analysis",
        4,
        2,
        {"reg_param": ("0.1", "0.5", "0.01")},
        misspelt={"reg_param": "reg"},
        removed=(("max_iter", "200"),),
        wrong_modules=("qda", "linear_model"),
        fit_owner="QuadraticDiscriminantAnalysis",
    ),
    Estimator(
        "MLPClassifier",
        "neural_network",
        7,
        5,
        {
            "hidden_layer_sizes": ("(10,)", "(20,)", "(50,)", "(100,)", "(50, 20)"),
            "max_iter": ("20", "50", "100", "200"),
            "alpha": ("0.01", "0.1", "1.0"),
            "activation": ("'relu'", "'tanh'", "'logistic'"),
            "random_state": SEEDS,
        },
        misspelt={"hidden_layer_sizes": "hidden_layers", "max_iter": "epochs"},
        wrong_values={
            "activation": ("'sigmoid'", "a str among {'identity', 'logistic', 'relu', 'tanh'}"),
            "solver": ("'rmsprop'", "a str among {'adam', 'sgd', 'lbfgs'}"),
        },
        removed=(("dropout", "0.1"),),
        wrong_modules=("neural_networks", "mlp", "linear_model"),
        fit_owner="BaseMultilayerPerceptron",
        mistaken_for=("linear_model", "Perceptron"),
    ),
)
