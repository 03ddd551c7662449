"""Read what a wandb run logged from its offline file, to see what really arrived there.

The file is a LevelDB-style log: a 7-byte header, then blocks of 32 KiB, each a row of chunks
(crc32: u32, length: u16, kind: u8, data) that add up to protobuf `Record`s.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32 * 1024
WHOLE, FIRST, LAST = 1, 2, 4


def read_records(path: Path) -> Iterator[Record]:
    wandb.teardown()  # `finish` returns before all of it is on the disk
    data = path.read_bytes()
    assert data.startswith(b":W&B"), path
    position, parts = HEADER, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # too little is left of this block for a chunk
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        parts = chunk if kind in (WHOLE, FIRST) else parts + chunk
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows that `wandb.log` wrote, of the one offline run below a folder."""
    (path,) = folder.rglob("run-*.wandb")
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in read_records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def read_summary(folder: Path) -> dict[str, Any]:
    """What was put into the summary itself, of the one offline run below a folder."""
    (path,) = folder.rglob("run-*.wandb")
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in read_records(path)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
