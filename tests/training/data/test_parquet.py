"""What a parquet file costs is known before it is read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xr0_engine.training.data import parquet
from xr0_engine.training.data.parquet import read_table
from xr0_engine.training.data.samples import DataError

ROWS = 100_000
WORD = "fold the towel " * 600


def same(words: int) -> pa.Array:
    """One word in every row; on the disk it stands once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * words, pa.int32()), pa.array([WORD]))


def test_what_was_written_is_read(tmp_path):
    words = pa.array(["a", "b", None, "a"])
    table = pa.table({"n": [1, 2, 3, 4], "task": words, "tasks": [["a"], [], None, ["a", "b"]], "left out": [0] * 4})
    pq.write_table(table, tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet", {"n", "task", "tasks", "absent"})
    assert found.to_pylist() == table.drop_columns(["left out"]).to_pylist()
    assert pa.types.is_string(found["task"].type)
    assert read_table(tmp_path / "t.parquet", {"n"}, [("n", "=", 3)]).to_pylist() == [{"n": 3}]


@pytest.mark.parametrize("column", ["word", "list"])
def test_a_word_in_many_rows_is_refused_before_it_is_spread(tmp_path, column):
    path = tmp_path / "t.parquet"
    columns = {"word": same(ROWS), "list": pa.ListArray.from_arrays(pa.array(range(ROWS + 1), pa.int32()), same(ROWS))}
    pq.write_table(pa.table({column: columns[column]}), path, store_schema=False)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"t\.parquet: expected at most 256 MiB of text, got 858: shorten it"):
        read_table(path)


def test_rows_are_limited_by_the_metadata(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": range(ROWS), "m": [0] * ROWS}), path)
    monkeypatch.setattr(parquet, "MOST_CELLS", ROWS)
    assert read_table(path, {"m"}).num_rows == ROWS
    monkeypatch.setattr(pq, "read_table", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(DataError, match=rf"t\.parquet: expected at most {ROWS} rows times columns, got {ROWS} times 2"):
        read_table(path)


def test_damaged_statistics_do_not_end_the_process(tmp_path):
    """A column that is said to have a value in every row, beside statistics of one that has not."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"task": pa.array(["a", None])}), path)
    data = path.read_bytes()
    at = data.index(b"\x04task")
    path.write_bytes(data[: at - 2] + b"\x00" + data[at - 1 :])
    with pytest.raises(DataError, match=r"t\.parquet"):
        read_table(path)


def test_pieces_are_limited(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": range(100)}), path, row_group_size=10)
    monkeypatch.setattr(parquet, "MOST_PIECES", 9)
    with pytest.raises(DataError, match="expected at most 9 pieces, got 1 columns in 10 groups of rows"):
        read_table(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 30], ids=["empty", "short", "no footer"])
def test_what_is_no_parquet_is_named(tmp_path, content):
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\.parquet cannot be read as parquet"):
        read_table(path)
