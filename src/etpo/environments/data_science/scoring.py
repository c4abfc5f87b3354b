"""What a program is worth: its mean ROC AUC over random splits, drawn where it cannot see them.

Deviations from the paper (arXiv 2402.06700, section 5), all but the last undone by
`protocol="paper"`: 40% of the rows never enter a reward; GridSearchCV is allowed; a split that
leaves a class out of a half, where ROC AUC is not defined, is drawn again.
"""

import hashlib
import json
import platform
import sqlite3
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from etpo.environments.data_science.encoding import Dataset
from etpo.environments.data_science.renaming import canonical_form
from etpo.environments.data_science.score_cache import ScoreCache
from etpo.environments.sandbox import Outcome, Sandbox, Split
from etpo.errors import ConfigError, OutputError

FAILURE_REWARD = -1.0
HELD_OUT_FRACTION = 0.4
_UNSTRATIFIED_DRAWS = 100
_REFUSED = "RuntimeError: GridSearchCV is not allowed"


class Score(NamedTuple):
    """reward: mean ROC AUC in [0, 1], or -1 with the error text; cached: known before this call."""

    reward: float
    error: str | None
    cached: bool


class Trial(NamedTuple):
    """One run of a program: its score, by split too, and the CPU seconds of all its threads."""

    reward: float
    split_aucs: list[float] | None
    error: str | None
    cpu_seconds: float


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
    """ROC AUC of the second column (two classes) or one-vs-one macro, of [m, n_classes] floats.

    Probabilities are rounded to 1e-9 first: a parallel forest differs in the last bits. Raises
    ValueError where those of several classes do not sum to one.
    """
    rounded = np.round(probabilities, 9)
    if rounded.shape[1] == 2:
        return float(roc_auc_score(y_test, rounded[:, 1]))
    return float(roc_auc_score(y_test, rounded, multi_class="ovo", average="macro"))


class ProgramScorer:
    """Scores programs on one data set and remembers what it has scored.

    Under `held_out`, 40% of the rows (stratified) are set aside by `split_seed`. The reward is the
    mean ROC AUC over `n_splits` random 50/50 splits of the other rows, under `paper` of all rows.
    The splits come from `split_seed` too and are as random as the paper's: not stratified, unless
    100 draws leave a class out of a half. `split_seed` and the program's `canonical_form` alone
    seed its run, so a reward depends on neither order nor neighbours nor the seed of the training,
    and what works is worth the same under other names: one program of the same form is run.

    cache_path: a file that keeps the scores for other runs (`ScoreCache`), or None. Programs that
    ran out of time are not kept there: another machine may be faster. cache_entries: the largest
    number of scores in it, >= 1. Raises ConfigError where the file cannot be used.
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
        self.dataset = dataset
        self.sandbox = sandbox
        self.protocol = protocol
        self.split_seed = split_seed
        self.n_splits = n_splits
        self.cache_hits = 0
        self._cache: dict[str, Score] = {}
        self._working: dict[str, Score] = {}  # by canonical form
        random = np.random.RandomState(split_seed)
        rows = np.arange(len(dataset.target))
        self.reward_rows, self.held_out_rows = rows, rows[:0]
        if protocol == "held_out":
            reward_rows, held_out_rows = train_test_split(
                rows, test_size=HELD_OUT_FRACTION, stratify=dataset.target, random_state=random
            )
            self.reward_rows, self.held_out_rows = np.sort(reward_rows), np.sort(held_out_rows)
        halves = [draw_halves(self.reward_rows, dataset.target, random) for _ in range(n_splits)]
        self.n_train_rows = len(halves[0][0])
        self._splits, self._y_tests = self._prepare(halves)
        self._disk = None
        if cache_path is not None:
            self._disk = self._open_cache(Path(cache_path), cache_entries)

    def start(self) -> None:
        """Start the sandbox unless it runs; the first score does it too."""
        self.sandbox.start()

    def close(self) -> None:
        """Stop the sandbox."""
        self.sandbox.close()

    def score(
        self,
        programs: Sequence[str],
        on_result: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        """One `Score` per program; of equal ones, and of those with one form that work, one runs.

        A failure's error text may hold names, so each program that fails is run.
        `on_result(done, total)` is called as the scores of the `total` new programs come in.
        """
        distinct = dict.fromkeys(programs)
        if self._disk is not None:
            self.load_scores(self._disk.get(p for p in distinct if p not in self._cache))
        fresh = [p for p in distinct if p not in self._cache]
        ran = self._score_fresh(fresh, on_result)
        if self._disk is not None:
            self._keep_on_disk(
                {
                    program: self._cache[program][:2]
                    for program in fresh
                    if not (self._cache[program].error or "").startswith("TimeoutError")
                }
            )
        scores = []
        for program in programs:
            scores.append(self._cache[program]._replace(cached=program not in ran))
            ran.discard(program)
        self.cache_hits += sum(score.cached for score in scores)
        return scores

    def held_out(self, programs: Sequence[str]) -> list[Score] | None:
        """Fit on all reward rows and score once on the held-out rows; None under `paper`."""
        if not len(self.held_out_rows):
            return None
        splits, y_tests = self._prepare([(self.reward_rows, self.held_out_rows)])
        scores = self._run(list(dict.fromkeys(programs)), splits, y_tests, None)
        return [scores[program] for program in programs]

    def trial(self, program: str) -> Trial:
        """Runs a program on every split, known or not, and keeps nothing."""
        if self._is_refused(program):
            return Trial(FAILURE_REWARD, None, _REFUSED, 0.0)
        (outcome,) = self._outcomes([program], self._splits, None)
        reward, error, _ = _score(outcome, self._y_tests)
        aucs = None if error is not None else split_aucs(outcome, self._y_tests)
        return Trial(reward, aucs, error, outcome.seconds)

    def known_scores(self) -> dict[str, tuple[float, str | None]]:
        """Reward and error of every program that was scored, by its text."""
        return {program: (score.reward, score.error) for program, score in self._cache.items()}

    def load_scores(self, scores: dict[str, tuple[float, str | None]]) -> None:
        """Takes `known_scores` of an earlier run over; what is here already stays."""
        self._take(
            {
                program: Score(*score, cached=True)
                for program, score in scores.items()
                if program not in self._cache
            }
        )

    def program_seed(self, program: str) -> int:
        """The seed, in 0..2**32 - 1, that a program runs with."""
        text = f"{self.split_seed}\n{canonical_form(program)}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:4])

    def _score_fresh(
        self, programs: list[str], on_result: Callable[[int, int], None] | None
    ) -> set[str]:
        """Take the scores of `programs` into the cache; returns those that were run."""
        forms = {program: self._form(program) for program in programs}
        firsts = {form: program for program, form in reversed(forms.items())}
        ran: set[str] = set()
        done = 0

        def count(*_: object) -> None:
            nonlocal done
            done += 1
            if on_result is not None:
                on_result(done, len(programs))

        twins = [program for program in programs if firsts[forms[program]] != program]
        for batch in ([p for p in programs if firsts[forms[p]] == p], twins):
            to_run = [program for program in batch if forms[program] not in self._working]
            scores = self._run(to_run, self._splits, self._y_tests, count)
            for program in batch:
                if program not in scores:
                    scores[program] = self._working[forms[program]]
                    count()
            self._take(scores)
            ran.update(to_run)
        return ran

    def _take(self, scores: dict[str, Score]) -> None:
        """Keep scores by program, and by form where the program works."""
        self._cache |= scores
        self._working |= {self._form(p): s for p, s in scores.items() if s.error is None}

    def _form(self, program: str) -> str:
        return program if self._is_refused(program) else canonical_form(program)

    def _is_refused(self, program: str) -> bool:
        return self.protocol == "paper" and "GridSearchCV(" in program

    @property
    def key(self) -> str:
        """JSON of `task`."""
        return json.dumps(self.task, sort_keys=True)

    @property
    def task(self) -> dict[str, Any]:
        """What a score depends on besides the program: data, splits, seed, limits, versions."""
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

    def _keep_on_disk(self, scores: dict[str, tuple[float, str | None]]) -> None:
        assert self._disk is not None
        try:
            self._disk.put(scores)
        except sqlite3.Error as error:
            raise OutputError(f"environment.score_cache={self._disk.path}: {error}") from error

    def _open_cache(self, path: Path, max_entries: int) -> ScoreCache:
        try:
            return ScoreCache(path, self.task, max_entries)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"environment.score_cache={path}: {error}; allowed is a file that this run may "
                f"write, or null"
            ) from error

    def _prepare(
        self, halves: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[list[Split], list[np.ndarray]]:
        """Imputed splits from (training rows, test rows), and the labels that stay here."""
        x, y, categorical = self.dataset.features, self.dataset.target, self.dataset.categorical
        splits = []
        for train, test in halves:
            x_train, x_test = impute(x[train], x[test], categorical)
            splits.append(Split(x_train=x_train, y_train=y[train], x_test=x_test))
        return splits, [y[test] for _, test in halves]

    def _run(
        self,
        programs: list[str],
        splits: list[Split],
        y_tests: list[np.ndarray],
        on_result: Callable[[int, Outcome], None] | None,
    ) -> dict[str, Score]:
        scores = {
            program: Score(FAILURE_REWARD, _REFUSED, cached=False)
            for program in programs
            if self._is_refused(program)
        }
        programs = [program for program in programs if program not in scores]
        if programs:
            outcomes = self._outcomes(programs, splits, on_result)
            for program, outcome in zip(programs, outcomes, strict=True):
                scores[program] = _score(outcome, y_tests)
        return scores

    def _outcomes(
        self,
        programs: list[str],
        splits: list[Split],
        on_result: Callable[[int, Outcome], None] | None,
    ) -> list[Outcome]:
        self.start()
        seeds = [self.program_seed(program) for program in programs]
        return self.sandbox.run(
            programs, splits, self.dataset.n_classes, seeds, on_result=on_result
        )


def draw_halves(
    rows: np.ndarray, target: np.ndarray, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Two random halves of `rows`, each with every class; stratified only if 100 draws fail."""
    n_classes = len(np.unique(target[rows]))
    for _ in range(_UNSTRATIFIED_DRAWS):
        train, test = train_test_split(rows, test_size=0.5, random_state=random)
        if all(len(np.unique(target[half])) == n_classes for half in (train, test)):
            return train, test
    train, test = train_test_split(rows, test_size=0.5, random_state=random, stratify=target[rows])
    return train, test


def split_aucs(outcome: Outcome, y_tests: list[np.ndarray]) -> list[float]:
    """ROC AUC of a program that works, by split; ValueError where `roc_auc` has one."""
    return [roc_auc(y, p) for y, p in zip(y_tests, outcome.probabilities, strict=True)]


def _score(outcome: Outcome, y_tests: list[np.ndarray]) -> Score:
    if outcome.error is not None:
        return Score(FAILURE_REWARD, outcome.error, cached=False)
    try:
        aucs = split_aucs(outcome, y_tests)
    except ValueError as error:
        return Score(FAILURE_REWARD, f"ValueError: {error}", cached=False)
    return Score(float(np.mean(aucs)), None, cached=False)
