"""Score programs by their mean ROC AUC over random splits with hidden test rows.

Deviations from the paper (arXiv 2402.06700, section 5): 40% of the rows are held out of the reward,
and GridSearchCV is allowed, unless `protocol="paper"`; a split that lacks a class in one half is
drawn again, because its ROC AUC is undefined.
"""

import hashlib
import itertools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from etpo.errors import ConfigError
from etpo_sandbox import Outcome, Sandbox, SandboxError, Split
from etpo_tasks.data_science.encoding import Dataset
from etpo_tasks.data_science.program_identity import canonical_form
from etpo_tasks.data_science.score_cache import ScoreCache

FAILURE_REWARD = -1.0
HELD_OUT_FRACTION = 0.4
_UNSTRATIFIED_DRAWS = 100
_REFUSED = Outcome(None, "RuntimeError: GridSearchCV is not allowed", 0.0)
Fold = tuple[Split, np.ndarray]  # split for the sandbox, test labels (never sent to it)


class Score(NamedTuple):
    reward: float  # mean ROC AUC in [0, 1], -1 for a failure
    error: str | None
    cached: bool  # known before this call


class Trial(NamedTuple):
    reward: float
    split_aucs: list[float] | None
    error: str | None
    cpu_seconds: float  # of all threads


@contextmanager
def sandbox_errors() -> Iterator[None]:
    """Turn a SandboxError into a ConfigError that names the config key."""
    try:
        yield
    except SandboxError as error:
        raise ConfigError(f"environment.sandbox.{error}") from error


@sandbox_errors()
def make_sandbox(**settings: Any) -> Sandbox:
    """Create a `Sandbox`; raise ConfigError for settings that are not allowed."""
    return Sandbox(**settings)


def impute(
    x_train: np.ndarray, x_test: np.ndarray, categorical: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fill NaN by the median (numeric columns) or the most frequent category of `x_train`.

    A column that is empty in `x_train` is filled with 0.
    """
    x_train, x_test = x_train.copy(), x_test.copy()
    for strategy, columns in (("median", ~categorical), ("most_frequent", categorical)):
        if columns.any():
            imputer = SimpleImputer(strategy=strategy, keep_empty_features=True)
            x_train[:, columns] = imputer.fit_transform(x_train[:, columns])
            x_test[:, columns] = imputer.transform(x_test[:, columns])
    return x_train, x_test


def roc_auc(y_test: np.ndarray, probabilities: np.ndarray) -> float:
    """Compute ROC AUC (two classes) or its one-vs-one macro mean from [m, n_classes] floats.

    Raises ValueError if the rows of three or more classes do not sum to one.
    """
    # predictions of a parallel forest vary in the last bits
    rounded = np.round(probabilities, 9)
    if rounded.shape[1] == 2:
        return float(roc_auc_score(y_test, rounded[:, 1]))
    return float(roc_auc_score(y_test, rounded, multi_class="ovo", average="macro"))


def draw_halves(
    rows: np.ndarray, target: np.ndarray, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Draw two halves of `rows`, each with every class; stratify after 100 failed draws."""
    n_classes = len(np.unique(target[rows]))
    for _ in range(_UNSTRATIFIED_DRAWS):
        train, test = train_test_split(rows, test_size=0.5, random_state=random)
        if all(len(np.unique(target[half])) == n_classes for half in (train, test)):
            return train, test
    train, test = train_test_split(rows, test_size=0.5, random_state=random, stratify=target[rows])
    return train, test


class ProgramScorer:
    """Score programs on one data set and remember their scores.

    `split_seed` draws the held-out rows (40%, stratified; none with `protocol="paper"`) and the
    `n_splits` random 50/50 splits of the other rows. A program's run is seeded by `split_seed` and
    its `canonical_form`. Rewards therefore do not depend on the order of programs, the other
    programs, the training seed or variable names. `cache_path` is the file of a `ScoreCache`.
    """

    def __init__(
        self,
        dataset: Dataset,
        sandbox: Sandbox,
        *,
        protocol: str = "held_out",
        split_seed: int = 0,
        n_splits: int = 5,
        cache_path: str | None = None,
        cache_entries: int = 1_000_000,
    ) -> None:
        self.dataset, self.sandbox = dataset, sandbox
        self.protocol, self.split_seed, self.n_splits = protocol, split_seed, n_splits
        self._scores: dict[str, tuple[float, str | None]] = {}
        self._working: dict[str, tuple[float, None]] = {}  # by canonical form
        random = np.random.RandomState(split_seed)
        rows = np.arange(len(dataset.target))
        self.reward_rows, self.held_out_rows = rows, rows[:0]
        if protocol == "held_out":
            self.reward_rows, self.held_out_rows = map(
                np.sort,
                train_test_split(
                    rows, test_size=HELD_OUT_FRACTION, stratify=dataset.target, random_state=random
                ),
            )
        halves = [draw_halves(self.reward_rows, dataset.target, random) for _ in range(n_splits)]
        self.n_train_rows = len(halves[0][0])
        self.folds = self._make_folds(halves)
        self._disk = ScoreCache(Path(cache_path), self.task, cache_entries) if cache_path else None

    @property
    def task(self) -> dict[str, Any]:
        """Everything that a score depends on except the program, as JSON values."""
        return {
            "data": self.dataset.content_hash,
            "protocol": self.protocol,
            "split_seed": self.split_seed,
            "n_splits": self.n_splits,
            "deadline": self.sandbox.deadline,
            "memory_mib": self.sandbox.memory_mib,
            "versions": {name: version(name) for name in ("numpy", "scipy", "scikit-learn")},
            "python": platform.python_version(),
        }

    @sandbox_errors()
    def start(self) -> None:
        """Start the sandbox if it is not running."""
        self.sandbox.start()

    def score(
        self, programs: Sequence[str], on_result: Callable[[int, int], None] | None = None
    ) -> list[Score]:
        """Return one `Score` per program; equal programs and working renamed copies run once.

        `on_result(done, total)` is called after each of the `total` new programs.
        """
        distinct = dict.fromkeys(programs)
        if self._disk is not None:
            self.load_scores(self._disk.get(p for p in distinct if p not in self._scores))
        new = [program for program in distinct if program not in self._scores]
        ran = self._score_new(new, on_result)
        if self._disk is not None:
            self._disk.put({program: self._scores[program] for program in new})
        scores = []
        for program in programs:
            scores.append(Score(*self._scores[program], cached=program not in ran))
            ran.discard(program)
        return scores

    def held_out(self, programs: Sequence[str]) -> list[Score] | None:
        """Fit on all reward rows and score on the held-out rows; None if no rows are held out."""
        if not len(self.held_out_rows):
            return None
        folds = self._make_folds([(self.reward_rows, self.held_out_rows)])
        trials = self._run(list(dict.fromkeys(programs)), folds)
        return [Score(trials[p].reward, trials[p].error, cached=False) for p in programs]

    def trial(self, program: str) -> Trial:
        """Run a program on every split, even if its score is known; store nothing."""
        return self._run([program], self.folds)[program]

    def known_scores(self) -> dict[str, tuple[float, str | None]]:
        """Return reward and error of every scored program."""
        return dict(self._scores)

    def load_scores(self, scores: Mapping[str, tuple[float, str | None]]) -> None:
        """Add scores; existing ones stay."""
        new = {program: tuple(scores[program]) for program in scores if program not in self._scores}
        self._scores |= new
        self._working |= {self._form(p): score for p, score in new.items() if score[1] is None}

    def program_seed(self, program: str) -> int:
        """Return the seed of a program's run, in 0..2**32 - 1."""
        text = f"{self.split_seed}\n{canonical_form(program)}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:4])

    def _score_new(
        self, programs: list[str], on_result: Callable[[int, int], None] | None
    ) -> set[str]:
        """Score and remember `programs`; return those that ran.

        A renamed copy runs only if its original fails, because the error text may contain names.
        """
        done = itertools.count(1)

        def report(*_: object) -> None:
            if on_result is not None:
                on_result(next(done), len(programs))

        forms = {program: self._form(program) for program in programs}
        originals = {form: program for program, form in reversed(forms.items())}.values()
        ran: set[str] = set()
        for copies in (False, True):
            batch = [program for program in programs if (program not in originals) is copies]
            known = {p: self._working[forms[p]] for p in batch if forms[p] in self._working}
            trials = self._run([p for p in batch if p not in known], self.folds, report)
            for _ in known:
                report()
            self.load_scores(known | {p: (t.reward, t.error) for p, t in trials.items()})
            ran |= trials.keys()
        return ran

    def _form(self, program: str) -> str:
        return program if self._is_refused(program) else canonical_form(program)

    def _is_refused(self, program: str) -> bool:
        return self.protocol == "paper" and "GridSearchCV(" in program

    def _make_folds(self, halves: list[tuple[np.ndarray, np.ndarray]]) -> list[Fold]:
        """Return imputed splits and test labels from pairs of training and test rows."""
        x, y = self.dataset.features, self.dataset.target
        folds = []
        for train, test in halves:
            x_train, x_test = impute(x[train], x[test], self.dataset.categorical)
            folds.append((Split(x_train=x_train, y_train=y[train], x_test=x_test), y[test]))
        return folds

    def _run(
        self,
        programs: list[str],
        folds: list[Fold],
        on_result: Callable[[int, Outcome], None] | None = None,
    ) -> dict[str, Trial]:
        self.start()
        splits, y_tests = zip(*folds, strict=True)
        outcomes = dict.fromkeys(programs, _REFUSED)
        allowed = [program for program in programs if not self._is_refused(program)]
        seeds = [self.program_seed(program) for program in allowed]
        n_classes = self.dataset.n_classes
        ran = self.sandbox.run(allowed, splits, n_classes, seeds, on_result=on_result)
        outcomes |= zip(allowed, ran, strict=True)
        return {program: evaluate(outcome, y_tests) for program, outcome in outcomes.items()}


def evaluate(outcome: Outcome, y_tests: Sequence[np.ndarray]) -> Trial:
    """Compute the ROC AUC of each split and their mean, the reward; -1 for a failure."""
    error = outcome.error
    if error is None:
        try:
            aucs = [roc_auc(y, p) for y, p in zip(y_tests, outcome.probabilities, strict=True)]
            return Trial(float(np.mean(aucs)), aucs, None, outcome.seconds)
        except ValueError as invalid:
            error = f"ValueError: {invalid}"
    return Trial(FAILURE_REWARD, None, error, outcome.seconds)
