"""Parquet files, whose cost is told by their metadata before any column is read: a thousand bytes may stand for as many
millions of values, and a word in them for as many words."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xr0_engine.files import FAULTS, one_line, pointer_fault
from xr0_engine.training.data.samples import DataError

MOST_CELLS = 1 << 25
"""Rows times columns, of those that are read: 4 million rows of 8."""
MOST_TEXT_BYTES = 256 << 20
MOST_PIECES = 1 << 20
"""Columns times groups of rows. A file of a gigabyte has some hundreds."""


def read_schema(path: Path) -> Any:
    """What columns a file has, as pyarrow tells it. Raises DataError as read_table."""
    with reading(path):
        _refuse_pointer(path)
        return pq.read_schema(path)


def read_table(path: Path, wanted: Collection[str] | None = None, filters: Any = None) -> Any:
    """Those of the wanted columns that the file has, as a table of pyarrow's; None: all. filters: as pyarrow's. Text
    that is nested in lists comes as dictionaries. Raises DataError that names the file, also one that is not there."""
    with reading(path):
        _refuse_pointer(path)
        metadata = pq.read_metadata(path)
        names = [name for name in metadata.schema.to_arrow_schema().names if wanted is None or name in wanted]
        texts = _check_cost(metadata, set(names))
        # A word that stands in many rows is read once.
        found = pq.read_table(path, columns=names, filters=filters, read_dictionary=texts)
        _check_text(found)
        for place, field in enumerate(found.schema):
            if pa.types.is_dictionary(field.type):
                found = found.set_column(place, field.name, found.column(place).cast(field.type.value_type))
        return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside with what a file holds becomes one DataError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException, *FAULTS) as error:
        if isinstance(error, DataError):
            raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        raise DataError(f"{path} cannot be read as parquet: {one_line(error)}") from None


def _refuse_pointer(path: Path) -> None:
    if fault := pointer_fault(path):
        raise DataError(fault)


def _check_cost(metadata: Any, names: Collection[str]) -> list[str]:
    """Raises DataError by what the metadata tell of these columns. The paths of those that hold text.

    What they tell of groups of rows is not asked: of damaged ones, pyarrow ends the process.
    """
    if metadata.num_columns * metadata.num_row_groups > MOST_PIECES:
        raise DataError(
            f"expected at most {MOST_PIECES} pieces, got {metadata.num_columns} columns in {metadata.num_row_groups} "
            "groups of rows: write it in larger groups"
        )
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    columns = [column for column in columns if column.path.split(".")[0] in names]
    if metadata.num_rows * len(columns) > MOST_CELLS:
        raise DataError(
            f"expected at most {MOST_CELLS} rows times columns, got {metadata.num_rows} times {len(columns)}: split it "
            "into files of fewer episodes"
        )
    return sorted({column.path for column in columns if column.physical_type == "BYTE_ARRAY"})


def _check_text(found: Any) -> None:
    size = 0
    for column in found.columns:
        for chunk in column.chunks:
            while pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                chunk = chunk.flatten()
            if pa.types.is_dictionary(chunk.type):
                lengths = pc.binary_length(chunk.dictionary.cast(pa.binary()))
                size += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    if size > MOST_TEXT_BYTES:
        raise DataError(f"expected at most {MOST_TEXT_BYTES >> 20} MiB of text, got {size >> 20}: shorten it")
