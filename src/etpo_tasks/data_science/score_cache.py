"""Cache of scores on disk, shared by runs of the same task."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from etpo.errors import ConfigError, OutputError

_BUSY_SECONDS = 60.0


class ScoreCache:
    """Map programs to (reward, error) in an SQLite file that concurrent runs may share.

    `task` is everything else that a score depends on. The file keeps the latest `max_entries`
    scores over all tasks. Raises ConfigError if the file cannot be used.
    """

    def __init__(self, path: Path, task: Mapping[str, Any], max_entries: int) -> None:
        self.path, self.max_entries = path, max_entries
        self._task = json.dumps(task, sort_keys=True)
        table = "scores (key TEXT PRIMARY KEY, reward REAL, error TEXT)"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"environment.score_cache={path}: {error}; allowed is a file that this run may "
                "write, or null"
            ) from error

    def get(self, programs: Iterable[str]) -> dict[str, tuple[float, str | None]]:
        """Return the known scores, by program."""
        keys = {self._key(program): program for program in programs}
        known = "SELECT * FROM scores WHERE key IN (SELECT value FROM json_each(?))"
        with closing(self._connect()) as connection:
            rows = connection.execute(known, (json.dumps(list(keys)),))
            return {keys[key]: (reward, error) for key, reward, error in rows}

    def put(self, scores: Mapping[str, tuple[float, str | None]]) -> None:
        """Add scores by program, except timeouts, which depend on the machine."""
        rows = [
            (self._key(program), reward, error)
            for program, (reward, error) in scores.items()
            if not (error or "").startswith("TimeoutError")
        ]
        try:
            with closing(self._connect()) as connection, connection:
                connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)
                connection.execute(  # row ids grow with time
                    "DELETE FROM scores WHERE rowid <= (SELECT max(rowid) FROM scores) - ?",
                    (self.max_entries,),
                )
        except sqlite3.Error as error:
            raise OutputError(f"environment.score_cache={self.path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=_BUSY_SECONDS)

    def _key(self, program: str) -> str:
        text = f"{self._task}\n{program}".encode(errors="surrogatepass")
        return hashlib.sha256(text).hexdigest()
