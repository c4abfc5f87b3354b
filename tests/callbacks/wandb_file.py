"""Reads the file of an offline W&B run back, with W&B's own record class.

The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with records in one or more
parts, each part after its checksum (4 bytes), length (2) and kind (1).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, PART = 32 * 1024, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[Record]:
    """The records of a `.wandb` file, in order."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = HEADER, []
    while position + PART <= len(data):
        left = BLOCK - position % BLOCK
        if left < PART:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + PART])
        position += PART
        parts.append(data[position : position + length])
        position += length
        if kind in (FULL, LAST):
            yield Record.FromString(b"".join(parts))
            parts = []


def values(items: Any) -> dict[str, Any]:
    """Key, or keys joined by `/`, and value of the items of a record."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class Offline:
    """What an offline run holds: history (rows), config, summary, run, artifacts, files."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
        self.history, self.config, self.summary, self.metrics = [], {}, {}, {}
        self.artifacts, self.runs = [], []
        for file in self.files:
            for record in records(file):
                self.add(record)

    def add(self, record: Record) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            self.history.append(values(record.history.item))
        elif kind == "summary":
            self.summary |= values(record.summary.update)
        elif kind == "config":
            self.config |= values(record.config.update)
        elif kind == "run":
            self.runs.append(record.run)
            self.config |= values(record.run.config.update)
        elif kind == "metric":
            self.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            self.artifacts.append(record.artifact)
