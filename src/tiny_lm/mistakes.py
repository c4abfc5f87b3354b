"""Typical mistakes of code models and the error that each one raises."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tiny_lm.grammar import Program

PACKAGES = "/usr/lib/python3/dist-packages/sklearn"


class Mistake(NamedTuple):
    """One mistake of a program.

    Attributes:
        kind: One of `KINDS`.
        wrong: Text of the mistake, for kinds with several forms.
        right: Correct text in its place.
        error: `TypeName: message`.
        weight: Relative frequency.
    """

    kind: str
    wrong: str
    right: str
    error: str
    weight: float


KINDS = (
    "missing_import",
    "missing_scaler",
    "wrong_module",
    "missing_fit",
    "missing_return",
    "wrong_return",
    "wrong_data",
    "no_target",
    "unclosed",
    "misspelt",
    "wrong_value",
    "removed",
    "no_probability",
    "no_predict_proba",
)


def mistakes_of(program: "Program") -> list[Mistake]:
    """Return every mistake that is possible in this program, which must have none."""
    return [*_import_mistakes(program), *_flow_mistakes(program), *_argument_mistakes(program)]


def _import_mistakes(program: "Program") -> list[Mistake]:
    name = program.estimator.name
    undefined = f"NameError: name '{name}' is not defined"
    found = [Mistake("missing_import", f"import {name}", "", undefined, 3)]
    if program.preparation:
        step = program.preparation[0].split("(")[0]
        error = f"NameError: name '{step}' is not defined"
        found.append(Mistake("missing_scaler", step, "", error, 3))
    for module in program.estimator.wrong_modules:
        error = _module_error(module, name)
        found.append(Mistake("wrong_module", module, program.estimator.module, error, 1))
    return found


def _module_error(module: str, name: str) -> str:
    if module in ("tree", "ensemble", "svm", "linear_model", "cluster", "experimental"):
        path = f"({PACKAGES}/{module}/__init__.py)"
        return f"ImportError: cannot import name '{name}' from 'sklearn.{module}' {path}"
    return f"ModuleNotFoundError: No module named 'sklearn.{module}'"


def _flow_mistakes(program: "Program") -> list[Mistake]:
    name = program.estimator.name
    piped = bool(program.preparation) and program.preparation_form == "pipeline"
    unfitted = (
        f"NotFittedError: This {'Pipeline' if piped else name} instance is not fitted yet. "
        "Call 'fit' with appropriate arguments before using this estimator."
    )
    found = [
        Mistake("wrong_data", "X_train", "x_train", "NameError: name 'X_train' is not defined", 2),
    ]
    if program.fit_form in ("statement", "one_line"):
        found.append(Mistake("missing_fit", "", "", unfitted, 3))
    if program.fit_form in ("statement", "assigned"):
        error = "AttributeError: 'NoneType' object has no attribute 'predict_proba'"
        found.append(Mistake("missing_return", "", "", error, 3))
        other = "clf" if program.variable == "model" else "model"
        error = f"NameError: name '{other}' is not defined"
        found.append(Mistake("wrong_return", other, program.variable, error, 2))
    if not piped:
        error = (
            f"TypeError: {program.estimator.fit_owner}.fit() missing 1 required positional "
            "argument: 'y'"
        )
        found.append(Mistake("no_target", "", "", error, 1))
    if program.fit_form == "statement":
        line = program.render().count("\n") - 2
        error = f"SyntaxError: '(' was never closed (line {line + 1})"
        found.append(Mistake("unclosed", "", "", error, 1))
    return found


def _argument_mistakes(program: "Program") -> list[Mistake]:
    estimator, given = program.estimator, dict(program.arguments)
    unknown = f"TypeError: {estimator.name}.__init__() got an unexpected keyword argument"
    found = [
        Mistake("misspelt", wrong, right, f"{unknown} '{wrong}'", 3)
        for right, wrong in estimator.misspelt.items()
        if right in given
    ]
    for keyword, (value, allowed) in estimator.wrong_values.items():
        if keyword not in given:
            error = (
                f"InvalidParameterError: The '{keyword}' parameter of {estimator.name} must be "
                f"{allowed}. Got {value} instead."
            )
            found.append(Mistake("wrong_value", value, keyword, error[:200], 2))
    found += [
        Mistake("removed", value, keyword, f"{unknown} '{keyword}'", 2)
        for keyword, value in estimator.removed
    ]
    piped = bool(program.preparation) and program.preparation_form == "pipeline"
    if estimator.required:
        owner = "Pipeline" if piped else estimator.name
        error = f"AttributeError: This '{owner}' has no attribute 'predict_proba'"
        found.append(Mistake("no_probability", "", "probability", error, 9))
    if estimator.mistaken_for is not None and program.test_size is None:
        name = estimator.mistaken_for[1]
        error = f"AttributeError: '{name}' object has no attribute 'predict_proba'"
        if piped:
            error = "AttributeError: This 'Pipeline' has no attribute 'predict_proba'"
        found.append(Mistake("no_predict_proba", name, estimator.name, error, 9))
    return found
