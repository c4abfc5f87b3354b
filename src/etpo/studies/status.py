"""Whether a run of a study is finished, and which of its config keys do not identify it."""

import json
from pathlib import Path

# Config keys that do not identify a run: they may change between the sessions of a study.
IGNORED_KEYS = (
    "ckpt_path",
    "study",
    "optimized_metric",
    "paths.log_dir",
    "environment.data_dir",
    "environment.path",
    "environment.score_cache",
    "environment.score_cache_entries",
    "environment.sandbox.workers",
)


def incomplete_reason(folder: Path) -> str | None:
    """Return None for a finished run, else `failed: ...`, `unfinished` or its status."""
    failed, summary = folder / "failed.txt", folder / "summary.json"
    if failed.exists():
        return f"failed: {failed.read_text(encoding='utf-8').partition(chr(10))[0]}"
    if not summary.exists():
        return "unfinished"
    try:
        status = json.loads(summary.read_text(encoding="utf-8"))["status"]
    except (ValueError, KeyError, TypeError):
        return "unreadable: summary.json"
    return None if status == "finished" else status
