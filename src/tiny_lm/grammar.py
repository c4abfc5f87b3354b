"""The grammar: bodies of `build_model` as structured values that render to text.

The tables alone, not data, define the programs and their frequencies.
"""

import random
import re
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from tiny_lm.estimators import ESTIMATORS, SHALLOW_TREE, Estimator
from tiny_lm.mistakes import Mistake, mistakes_of

VARIABLES = ("model", "model", "model", "clf", "classifier")
FIT_FORMS = ("statement", "statement", "statement", "assigned", "returned", "one_line")
PREPARATIONS = (
    (),
    ("StandardScaler()",),
    ("MinMaxScaler()",),
    ("PolynomialFeatures(degree=2)",),
    ("StandardScaler()", "PolynomialFeatures(degree=2)"),
)
PREPARATION_WEIGHTS = (72, 14, 7, 4, 3)
IN_PLACE_RATE = 0.2
TEST_SIZES = (None, "0.2", "0.3", "0.5", "0.8", "0.9")
TEST_SIZE_WEIGHTS = (86, 4, 3, 2, 3, 2)
MISTAKE_RATE = 0.47
IMPROVED_MISTAKE_RATE = 0.3
SAME_REPAIR_RATE = 0.7


class Program(NamedTuple):
    """A body of `build_model` as a structured value.

    Attributes:
        arguments: (keyword, value text) in the order of the text.
        preparation: Transformers before the classifier.
        preparation_form: `pipeline` or `in_place`.
        fit_form: One of `FIT_FORMS`, the way `fit` and `return` are written.
        test_size: Share of the training rows that an unnecessary split discards, or None.
        estimator_first: Import the classifier before everything else.
    """

    estimator: Estimator
    arguments: tuple[tuple[str, str], ...]
    preparation: tuple[str, ...] = ()
    preparation_form: str = "pipeline"
    variable: str = "model"
    fit_form: str = "statement"
    test_size: str | None = None
    estimator_first: bool = True
    mistake: Mistake | None = None

    def render(self) -> str:
        """Return the body as lines indented by four spaces."""
        lines = [*self._imports(), *self._split(), *self._scaling(), *self._model()]
        return "".join(f"    {line}\n" for line in lines)

    def error(self) -> str | None:
        """Return the error of Python or scikit-learn, `TypeName: message`, or None if it runs."""
        return None if self.mistake is None else self.mistake.error

    def is_kind(self, kind: str) -> bool:
        """Return True if the program has a mistake of this kind."""
        return self.mistake is not None and self.mistake.kind == kind

    def _class(self) -> tuple[str, str]:
        """Return (module, name) of the classifier as written."""
        if self.is_kind("no_predict_proba"):
            return self.estimator.mistaken_for
        if self.is_kind("wrong_module"):
            return self.mistake.wrong, self.estimator.name
        return self.estimator.module, self.estimator.name

    def _imports(self) -> Iterator[str]:
        module, name = self._class()
        own = [] if self.mistake and self.mistake.wrong == f"import {name}" else [(module, name)]
        if any(value == SHALLOW_TREE for _, value in self._arguments()):
            own.append(("tree", "DecisionTreeClassifier"))
        others = []
        names = sorted(step.split("(")[0] for step in self.preparation)
        if names and not self.is_kind("missing_scaler"):
            others.append(("preprocessing", ", ".join(names)))
        if self.preparation and self.preparation_form == "pipeline":
            others.append(("pipeline", "make_pipeline"))
        if self.test_size is not None:
            others.append(("model_selection", "train_test_split"))
        ordered = own + others if self.estimator_first else others + own
        return (f"from sklearn.{module} import {name}" for module, name in ordered)

    def _split(self) -> list[str]:
        if self.test_size is None:
            return []
        call = f"train_test_split(x_train, y_train, test_size={self.test_size})"
        return [f"x_train, x_val, y_train, y_val = {call}"]

    def _scaling(self) -> list[str]:
        if self.preparation_form == "pipeline":
            return []
        return [f"x_train = {step}.fit_transform(x_train)" for step in self.preparation]

    def _arguments(self) -> list[tuple[str, str]]:
        """Return the constructor arguments as written, mistake included."""
        if self.is_kind("no_predict_proba"):
            return []
        arguments = list(self.arguments)
        if self.is_kind("no_probability"):
            return [argument for argument in arguments if argument[0] != "probability"]
        if self.is_kind("misspelt"):
            swap = {self.mistake.right: self.mistake.wrong}
            return [(swap.get(keyword, keyword), value) for keyword, value in arguments]
        if self.is_kind("wrong_value") or self.is_kind("removed"):
            return [*arguments, (self.mistake.right, self.mistake.wrong)]
        return arguments

    def _call(self) -> str:
        inside = ", ".join(f"{keyword}={value}" for keyword, value in self._arguments())
        call = f"{self._class()[1]}({inside})"
        if self.preparation and self.preparation_form == "pipeline":
            call = f"make_pipeline({', '.join((*self.preparation, call))})"
        return call[:-1] if self.is_kind("unclosed") else call

    def _model(self) -> list[str]:
        name, call = self.variable, self._call()
        data = {"wrong_data": "X_train, y_train", "no_target": "x_train"}
        fit = f"fit({data.get(self.mistake.kind if self.mistake else '', 'x_train, y_train')})"
        returned = self.mistake.wrong if self.is_kind("wrong_return") else name
        if self.is_kind("missing_fit"):
            one_line = self.fit_form == "one_line"
            return [f"return {call}"] if one_line else [f"{name} = {call}", f"return {name}"]
        if self.fit_form == "one_line":
            return [f"return {call}.{fit}"]
        if self.fit_form == "returned":
            return [f"{name} = {call}", f"return {name}.{fit}"]
        if self.fit_form == "assigned":
            lines = [f"{name} = {call}.{fit}"]
        else:
            lines = [f"{name} = {call}", f"{name}.{fit}"]
        return lines if self.is_kind("missing_return") else [*lines, f"return {returned}"]


def _sample_arguments(rng: random.Random, estimator: Estimator) -> tuple[tuple[str, str], ...]:
    counts = estimator.argument_counts
    count = rng.choices(range(len(counts)), counts)[0]
    keywords = rng.sample(list(estimator.settings), min(count, len(estimator.settings)))
    arguments = [(keyword, rng.choice(estimator.settings[keyword])) for keyword in keywords]
    arguments += estimator.required
    rng.shuffle(arguments)
    return tuple(arguments)


def sample(rng: random.Random, mistake_rate: float = MISTAKE_RATE, strong: bool = False) -> Program:
    """Draw a program, with a mistake with probability `mistake_rate`.

    With `strong`, draw the classifier by `strong_weight` and omit unnecessary splits.
    """
    weights = [item.strong_weight if strong else item.weight for item in ESTIMATORS]
    estimator = rng.choices(ESTIMATORS, weights)[0]
    program = Program(
        estimator=estimator,
        arguments=_sample_arguments(rng, estimator),
        preparation=rng.choices(PREPARATIONS, PREPARATION_WEIGHTS)[0],
        variable=rng.choice(VARIABLES),
        fit_form=rng.choice(FIT_FORMS),
        test_size=None if strong else rng.choices(TEST_SIZES, TEST_SIZE_WEIGHTS)[0],
        estimator_first=rng.random() < 0.6,
    )
    scaled = len(program.preparation) == 1 and "Scaler" in program.preparation[0]
    if scaled and rng.random() < IN_PLACE_RATE:
        program = program._replace(preparation_form="in_place")
    if estimator.name == "QuadraticDiscriminantAnalysis":
        # the fit needs more rows than features in every class
        program = program._replace(preparation=(), preparation_form="pipeline", test_size=None)
    if rng.random() >= mistake_rate:
        return program
    mistakes = mistakes_of(program)
    return program._replace(mistake=rng.choices(mistakes, [item.weight for item in mistakes])[0])


def sample_repair(rng: random.Random) -> tuple[Program, Program]:
    """Draw (failed program, answer); the answer is mostly the same program repaired."""
    failed = sample(rng, mistake_rate=1.0)
    same = rng.random() < SAME_REPAIR_RATE
    return failed, failed._replace(mistake=None) if same else sample(rng)


def sample_improvement(rng: random.Random) -> tuple[Program, float, Program]:
    """Draw (working program, score, answer); the score is independent of the program."""
    working = sample(rng, mistake_rate=0.0, strong=rng.random() < 0.3)
    answer = sample(rng, IMPROVED_MISTAKE_RATE, strong=True)
    return working, round(rng.uniform(0.4, 1.0), 3), answer


def parse(body: str) -> Program | None:
    """Return the program of the grammar that renders to `body`, or None."""
    for estimator in ESTIMATORS:
        names = {estimator.name, (estimator.mistaken_for or ("", estimator.name))[1]}
        for name in names:
            if (call := re.search(rf"\b{name}\(([^\n]*)", body)) is None:
                continue
            found = re.findall(r"(\w+)=((?:[^,()\n]|\([^()\n]*\))+)", call.group(1))
            for program in _candidates(estimator, tuple(found), body):
                if program.render() == body:
                    return program
    return None


def _candidates(
    estimator: Estimator, found: tuple[tuple[str, str], ...], body: str
) -> Iterator[Program]:
    """Yield programs with these arguments in all forms, with and without each mistake."""
    spellings = {wrong: right for right, wrong in estimator.misspelt.items()}
    allowed = {**estimator.settings, **{key: (value,) for key, value in estimator.required}}
    renamed = tuple((spellings.get(key, key), value) for key, value in found)
    for arguments in {found, renamed, found[:-1], (*found, *estimator.required)}:
        if any(value not in allowed.get(key, ()) for key, value in arguments):
            continue
        if not set(estimator.required) <= set(arguments):
            continue
        forms = product(
            sorted({name for name in VARIABLES if name in body} | {"model"}),
            sorted(set(FIT_FORMS)),
            PREPARATIONS,
            ("pipeline", "in_place"),
            [size for size in TEST_SIZES if size is None or f"test_size={size}" in body],
            (True, False),
        )
        for variable, fit_form, preparation, form, size, first in forms:
            if any(step.split("(")[0] not in body for step in preparation):
                continue
            program = Program(
                estimator, arguments, preparation, form, variable, fit_form, size, first
            )
            yield program
            yield from (program._replace(mistake=item) for item in mistakes_of(program))
