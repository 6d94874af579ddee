"""Rank 0: rows -> an Arrow stream in chunks, so that a source of any size never stands in memory as Python objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

# Few enough that long texts stay far below Arrow's 2 GiB a string column.
CHUNK_ROWS = 1000


def copy_rows(rows: datasets.Dataset, places: Sequence[int] | np.ndarray, path: Path | None) -> datasets.Dataset:
    """Some of the rows, in memory or as a file of their own.

    Args:
        rows: to choose from.
        places: of the chosen ones.
        path: file of the Arrow stream; None keeps them in memory.
    """
    sink = pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb")
    table = rows.data.table
    with sink, pa.ipc.new_stream(sink, table.schema) as stream:
        for start in range(0, len(places), CHUNK_ROWS):
            stream.write_table(table.take(pa.array(places[start : start + CHUNK_ROWS])))
    if path is None:
        return datasets.Dataset.from_buffer(sink.getvalue())
    return datasets.Dataset.from_file(str(path))


class TableWriter:
    """Rows that become a `datasets.Dataset`, in memory or memory-mapped.

    Args:
        features: of the columns.
        path: file of the Arrow stream; None keeps it in memory.
    """

    def __init__(self, features: datasets.Features, path: Path | None = None) -> None:
        self._schema = features.arrow_schema
        self._path = path
        self._sink = pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self._schema)
        self._rows: list[Sequence[Any]] = []

    def add(self, row: Sequence[Any]) -> None:
        """Add one row, its values in the order of the columns."""
        self._rows.append(row)
        if len(self._rows) == CHUNK_ROWS:
            self._flush()

    def finish(self) -> datasets.Dataset:
        """The rows; nothing can be added to them afterwards."""
        self._flush()
        self.close()
        if self._path is None:
            return datasets.Dataset.from_buffer(self._sink.getvalue())
        return datasets.Dataset.from_file(str(self._path))

    def close(self) -> None:
        """Give up what isn't finished."""
        self._stream.close()
        if self._path is not None:
            self._sink.close()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(self._schema, zip(*self._rows, strict=True), strict=True)
            arrays = [pa.array(values, type=field.type) for field, values in columns]
            self._stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._rows = []
