"""Reads the file of an offline W&B run back, with W&B's own record class.

The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with records in one or more
chunks, each after its checksum (4 bytes), length (2) and type (1). A chunk does not cross the end
of a block; fewer than 7 bytes there are padding.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
STARTS, ENDS = (FULL, FIRST), (FULL, LAST)


def chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of the chunks of a log, in order; raises ValueError at a broken one."""
    if data[:HEADER] != b":W&B\xe1\xbe\x00":
        raise ValueError("not a W&B log")
    position = HEADER
    while position < len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        start = position + HEADER
        if start > len(data):
            raise ValueError(f"the log ends in the header of a chunk at byte {position}")
        checksum, length, kind = struct.unpack("<IHB", data[position:start])
        position = start + length
        if position > len(data):
            raise ValueError(f"the log ends in the chunk at byte {start}")
        if checksum != crc32(data[start - 1 : position]):  # of type and payload
            raise ValueError(f"wrong checksum of the chunk at byte {start}")
        yield kind, data[start:position]


def records(file: Path) -> list[Record]:
    """The records of the `.wandb` file of a finished run, in order.

    Raises ValueError unless the file is whole.
    """
    found, parts = [], []
    for kind, payload in chunks(file.read_bytes()):
        if (kind in STARTS) == bool(parts):
            raise ValueError(f"a chunk of type {kind} after {len(parts)} of its record")
        parts.append(payload)
        if kind in ENDS:
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    if parts or not found or found[-1].WhichOneof("record_type") != "exit":
        raise ValueError("the log ends before the record of the run's end")
    return found


def values(items: Any) -> dict[str, Any]:
    """Key, or keys joined by `/`, and value of the items of a record."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class Offline:
    """What an offline run holds: history (rows), config, summary, run, artifacts, files.

    W&B's service still writes after `wandb.finish()`; waits until it has ended.
    """

    def __init__(self, folder: Path) -> None:
        wandb.teardown()
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
