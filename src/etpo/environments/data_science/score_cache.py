"""Scores on disk: what one run has scored, no other run of the same task has to score again."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

_BUSY_SECONDS = 60.0
_LOOKUPS = 500  # SQLite allows a limited number of variables in one statement


class ScoreCache:
    """(reward, error) by program, in an SQLite file that several runs may share at once.

    path: the file; it and its folder are made where they are missing. task: everything besides the
    program that its score depends on, as JSON-serialisable values; other tasks in the same file are
    kept apart. max_entries: scores of all tasks that the file keeps; beyond it the oldest go.
    Raises sqlite3.DatabaseError where the file is something else.
    """

    def __init__(self, path: Path, task: Mapping[str, Any], max_entries: int) -> None:
        self.path, self.max_entries = path, max_entries
        self._task = json.dumps(task, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, reward REAL, error TEXT)"
            )

    def get(self, programs: Iterable[str]) -> dict[str, tuple[float, str | None]]:
        """The scores that are known, by program."""
        keys = {self._key(program): program for program in programs}
        names = list(keys)
        found = {}
        with closing(self._connect()) as connection:
            for start in range(0, len(names), _LOOKUPS):
                part = names[start : start + _LOOKUPS]
                marks = ", ".join("?" * len(part))
                query = f"SELECT key, reward, error FROM scores WHERE key IN ({marks})"
                for key, reward, error in connection.execute(query, part):
                    found[keys[key]] = (reward, error)
        return found

    def put(self, scores: Mapping[str, tuple[float, str | None]]) -> None:
        """Adds scores by program; one that is there already stays."""
        rows = [(self._key(program), *score) for program, score in scores.items()]
        with closing(self._connect()) as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)
            # row ids grow as scores are added
            connection.execute(
                "DELETE FROM scores WHERE rowid <= (SELECT max(rowid) FROM scores) - ?",
                (self.max_entries,),
            )

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=_BUSY_SECONDS)

    def _key(self, program: str) -> str:
        text = f"{self._task}\n{program}".encode(errors="surrogatepass")
        return hashlib.sha256(text).hexdigest()
