"""Recordings of rerun, read back."""

from __future__ import annotations

import numpy as np
import pytest

rerun = pytest.importorskip("rerun")


def read(path):
    """Entity -> its rows in the order of time, {component: values, "time": seconds}; static ones have no time."""
    from rerun.chunk import RrdReader

    return _rows(RrdReader(path).stream())


def read_all(path):
    """(kind, title) -> as read, of each recording of a file."""
    from rerun.chunk import RrdReader

    reader, found = RrdReader(path), {}
    for entry in reader.recordings():
        rows = _rows(reader.stream(store=entry))
        title = next(row["name"][0] for row in rows["/__properties"] if row.get("name"))
        found[entry.application_id, title] = rows
    return found


def _rows(stream):
    rows = {}
    for chunk in stream:
        columns = chunk.to_record_batch().to_pydict()
        for number in range(chunk.num_rows):
            row = {name.partition(":")[2] or name: column[number] for name, column in columns.items()}
            if row.get("time") is not None:
                row["time"] = row["time"].total_seconds()
            rows.setdefault(chunk.entity_path, []).append(row)
    return {entity: sorted(found, key=lambda row: row.get("time", -np.inf)) for entity, found in rows.items()}


def series(rows, entity):
    """(times (N,), values (N, columns)) of an entity's scalars."""
    found = [row for row in rows.get(entity, []) if row.get("scalars") is not None]
    return np.array([row["time"] for row in found]), np.array([row["scalars"] for row in found], float)


def texts(rows):
    """Of events, in the order of time."""
    return [row["text"][0] for row in rows["/events"]]


def told_at(rows):
    """Of events, in the order of time: (seconds, text)."""
    return [(row["time"], row["text"][0]) for row in rows["/events"]]
