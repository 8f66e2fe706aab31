"""A cached unit's file: a header that tells whether the rest is what was written, then the unit.

Mapping the file would save a copy, 0.3 ms of 8 MB where reading and checking take 0.6. But a mapped
file that somebody cuts short ends the process, a mapped page that was evicted is read from disk while a
batch is formed, and an epoch's files would count as the process's memory.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.history import ArenaBuffers
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.packing import PackedUnit, unpack

__all__ = ["HEADER_BYTES", "DamagedError", "read_unit", "write_unit"]

# Magic, format, verified, bytes of the unit, its key, its checksum; then the CRC-32 of these.
_HEADER = struct.Struct("<8sIIQ16s16s")
_CRC = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CRC.size
_MAGIC = b"VLM unit"
_FORMAT = 1
# Words in a row of the checksum: 4 KiB, so that its sums are 1/512 of the data.
_ROW = 512


class DamagedError(Exception):
    """A file is not what was written: cut short, altered, or another unit's."""


def checksum(data: npt.NDArray[np.uint8]) -> bytes:
    """[16] of some bytes, a multiple of 8.

    They are laid out in rows of 4 KiB; hashed are the sums of 64-bit words, mod 2^64, of every row and
    of every column. At memory speed, where CRC-32 takes several times as long. What changes a single
    word changes a sum, and changes that cancel in a row's sum show in two columns'.
    """
    words = data.view(np.uint64)
    num_rows = len(words) // _ROW
    table = words[: num_rows * _ROW].reshape(num_rows, _ROW)
    hasher = hashlib.blake2b(len(data).to_bytes(8, "little"), digest_size=16)
    hasher.update(table.sum(axis=1, dtype=np.uint64).data)
    hasher.update(table.sum(axis=0, dtype=np.uint64).data)
    hasher.update(words[num_rows * _ROW :].data)
    return hasher.digest()


def write_unit(
    path: Path, key: bytes, packed: PackedUnit, buffers: ArenaBuffers, *, verified: bool
) -> int:
    """Write a new file; returns its size in bytes.

    Args:
        key: [16] by which it will be asked for.
        buffers: memory to put it together in.
        verified: whether its sequences were proved by their checksums.

    Raises:
        OSError: storage refused.
    """
    memory = buffers.empty(HEADER_BYTES + packed.num_bytes, np.uint8)
    content = memory[HEADER_BYTES:]
    packed.write(content)
    facts = _HEADER.pack(_MAGIC, _FORMAT, verified, len(content), key, checksum(content))
    header = facts + _CRC.pack(zlib.crc32(facts))
    memory[:HEADER_BYTES] = np.frombuffer(header, np.uint8)
    with open(path, "xb", buffering=0, opener=_private) as file:
        _write_all(file, memory)
    return len(memory)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_all(file: Any, memory: npt.NDArray[np.uint8]) -> None:
    rest = memory.data
    while len(rest):
        rest = rest[file.write(rest) :]


def read_unit(path: Path, key: bytes, buffers: ArenaBuffers) -> tuple[UnitData, bool]:
    """A unit, and whether its sequences were verified when it was written.

    Raises:
        DamagedError: the file is not what was written for this key.
        OSError: it is not there, or storage refused.
    """
    with path.open("rb", buffering=0) as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
        if len(header) < HEADER_BYTES:
            raise DamagedError(f"{path}: cut short")
        # Before memory is taken for what the rest claims to be.
        verified, found_sum = _check_header(path, header, key, size)
        memory = buffers.empty(size, np.uint8)
        memory[:HEADER_BYTES] = np.frombuffer(header, np.uint8)
        rest = memory[HEADER_BYTES:].data
        while len(rest):
            num_read = file.readinto(rest)
            if not num_read:
                raise DamagedError(f"{path}: cut short")
            rest = rest[num_read:]
    if checksum(memory[HEADER_BYTES:]) != found_sum:
        raise DamagedError(f"{path}: altered")
    try:
        # Not of a slice that numpy makes: that would not keep the lent memory.
        return unpack(pa.py_buffer(memory).slice(HEADER_BYTES)), bool(verified)
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: {error}") from error


def _check_header(path: Path, header: bytes, key: bytes, size: int) -> tuple[bool, bytes]:
    """Whether the unit was verified, and its checksum."""
    magic, form, verified, num_bytes, found_key, found_sum = _HEADER.unpack_from(header)
    (crc,) = _CRC.unpack_from(header, _HEADER.size)
    if magic != _MAGIC or form != _FORMAT or crc != zlib.crc32(header[: _HEADER.size]):
        raise DamagedError(f"{path}: no header")
    if found_key != key or num_bytes != size - HEADER_BYTES:
        raise DamagedError(f"{path}: another unit's, or cut short")
    return bool(verified), found_sum
