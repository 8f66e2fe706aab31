"""How each column is encoded: by the kind of its values, unless its trait says otherwise.

Measured on a file of 1.4 M rows of the benchmark's year, bytes and nanoseconds to decode a value: times
by deltas 4.27 and 1.5; items by deltas 2.67 and 1.4 (by split byte streams with zstd 2.61 and 4.0); a
float32 by split streams with zstd 3.36 and 2.0 (with LZ4 3.57 and 0.8); small integers by dictionary
0.90 and 1.1; event ids by split streams with zstd 2.00 and 2.6 (with LZ4 2.17 and 1.6, by deltas 2.64
and 1.8: one leap among 32 neighbours, as from a day to the next, widens all of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from vlm_dagster.errors import SchemaError

__all__ = [
    "ENCODINGS",
    "check_encoding",
    "default_encoding",
    "portable_encodings",
    "writer_options",
]

_PARQUET = {
    "delta": "DELTA_BINARY_PACKED",
    "byte_stream_split": "BYTE_STREAM_SPLIT",
    "plain": "PLAIN",
}
ENCODINGS = ("dictionary", *_PARQUET)
_DELTA_TYPES = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_SPLIT_TYPES = (pa.int32(), pa.int64(), pa.float32(), pa.float64())


def _fits(encoding: str, kind: pa.DataType) -> bool:
    timestamp = pa.types.is_timestamp(kind)
    if encoding == "delta":
        return timestamp or kind in _DELTA_TYPES
    if encoding == "byte_stream_split":
        return timestamp or kind in _SPLIT_TYPES
    if encoding == "dictionary":
        return bool(kind != pa.bool_())
    return encoding == "plain"


def check_encoding(name: str, encoding: str, kind: pa.DataType) -> None:
    """SchemaError unless a column of that type can be stored so."""
    if encoding not in ENCODINGS or not _fits(encoding, kind):
        fit = [e for e in ENCODINGS if _fits(e, kind)]
        raise SchemaError(
            f"trait {name!r}: encoding {encoding!r} does not fit {kind}",
            f"Use one of {', '.join(fit)}, or leave it out.",
        )


def default_encoding(name: str, kind: pa.DataType) -> str:
    """By kind: times and users are close to their neighbours, categories repeat, floats do neither.
    Events' own ids rise within a user, so their high bytes repeat and only the low ones do not."""
    own_id = name in ("event_id", "request_id")
    if pa.types.is_floating(kind) or (own_id and kind in (pa.int32(), pa.int64())):
        return "byte_stream_split"
    if pa.types.is_timestamp(kind) or kind in (pa.int32(), pa.int64()):
        return "delta"
    # Event ids differ in every row: a dictionary of them only costs.
    if kind == pa.bool_() or own_id:
        return "plain"
    return "dictionary"


def portable_encodings(schema: pa.Schema) -> dict[str, str]:
    """Instead of split byte streams, for readers that do not know them (Spark before its releases of
    2026): floats plain, events' own ids by deltas. Costs about a byte an event."""
    return {
        f.name: "plain" if pa.types.is_floating(f.type) else "delta"
        for f in schema
        if default_encoding(f.name, f.type) == "byte_stream_split"
    }


def writer_options(schema: pa.Schema, overrides: Mapping[str, str]) -> dict[str, Any]:
    """What ParquetWriter needs to know."""
    chosen = {f.name: overrides.get(f.name) or default_encoding(f.name, f.type) for f in schema}
    return {
        "use_dictionary": [name for name, how in chosen.items() if how == "dictionary"],
        "column_encoding": {
            name: _PARQUET[how] for name, how in chosen.items() if how != "dictionary"
        },
        # LZ4 decodes fastest; only in floats and split streams does zstd find more.
        "compression": {
            f.name: "zstd"
            if chosen[f.name] == "byte_stream_split" or pa.types.is_floating(f.type)
            else "lz4"
            for f in schema
        },
    }
