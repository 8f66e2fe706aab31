"""Are the sealed files what they were? Sizes against the log, bytes against names, rows against
digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_dagster.errors import CorruptFileError, TableError
from vlm_dagster.hashing import Digest
from vlm_dagster.sealed.reader import SegmentReader
from vlm_dagster.sealed.segments import find_segments
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.sealed.windowed import window_digests
from vlm_dagster.windows import Window

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and every problem found, each naming its file.

    Attributes:
        num_rows: rows whose digests were recomputed; 0 unless deep.
    """

    uri: str
    version: int
    num_windows: int
    num_files: int
    num_bytes: int
    num_rows: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    table: SealedTable,
    version: int,
    *,
    windows: Collection[str] | None = None,
    deep: bool = False,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check the files of a version.

    Every file must exist with the size that the log says, hash to its name, and carry a footer
    whose digests add up to each window's sealed digest. `deep` also decodes every row and
    recomputes the digests from it, which for a file of another writer is done in any case.

    Args:
        windows: keys to look at; all if None.
        progress: called with the bytes of each file when it is done.
    """
    state = table.state(version)
    chosen = {
        sealed.window.segment: sealed
        for _, sealed in sorted(state.sealed.items())
        if windows is None or sealed.window.key in windows
    }
    found = dict.fromkeys(chosen, Digest())
    problems: list[str] = []
    num_files = num_bytes = num_rows = 0
    files = table.files(version)
    try:
        segments = find_segments(table.uri, files["segment"].unique().to_pylist(), state)
    except TableError as error:
        return VerifyReport(table.uri, version, len(chosen), 0, 0, 0, (str(error),))
    looked_at = [s for s in segments if any(w.window.segment in chosen for w in s.windows(state))]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in files.to_pylist():
        groups.setdefault((row["segment"], row["bucket"]), []).append(row)
    for segment in looked_at:
        keys = [sealed.window for sealed in segment.windows(state)]
        for (name, _), rows in groups.items():
            if name != segment.name:
                continue
            try:
                digests, decoded = _check_files(table, version, rows, keys, deep)
                for key in found:
                    found[key] += digests.get(key, Digest())
                num_rows += decoded
            except CorruptFileError as error:
                problems.append(str(error))
            num_files += len(rows)
            size = sum(row["size_bytes"] for row in rows)
            num_bytes += size
            if progress is not None:
                progress(size)
    if not problems:
        problems.extend(
            f"window {sealed.window.key} of {table.uri}: what is left of digest {sealed.digest} is "
            f"{state.left(index)}, but its files add up to {found[sealed.window.segment]}"
            for index, sealed in sorted(state.sealed.items())
            if sealed.window.segment in chosen and found[sealed.window.segment] != state.left(index)
        )
    return VerifyReport(
        table.uri, version, len(chosen), num_files, num_bytes, num_rows, tuple(problems)
    )


def _check_files(
    table: SealedTable,
    version: int,
    files: Sequence[Mapping[str, Any]],
    windows: Sequence[Window],
    deep: bool,
) -> tuple[dict[str, Digest], int]:
    """The digests, by window, of the files of one segment and bucket; and how many rows were
    decoded for that."""

    def corrupt(path: str, problem: str) -> CorruptFileError:
        return CorruptFileError(table=table.uri, path=path, version=version, problem=problem)

    for file in files:
        size = table.storage.size(file["path"])
        if size is None:
            table.explain_missing(file["path"], version)
            raise corrupt(file["path"], "is missing")
        if size != file["size_bytes"]:
            raise corrupt(file["path"], f"has {size} bytes, but {file['size_bytes']} were sealed")
    paths = [file["path"] for file in files]
    reader = table.reader(paths, version)
    ours = isinstance(reader, SegmentReader)
    if ours:
        (path,) = paths
        name = path.rpartition("/")[2].removesuffix(".parquet")
        with table.storage.open_input(path) as source:
            hasher = hashlib.sha256()
            while chunk := source.read(1 << 22):
                hasher.update(chunk)
        if hasher.hexdigest() != name:
            raise corrupt(path, f"its bytes hash to {hasher.hexdigest()}, not to its name")
        if not deep:
            return reader.digests, 0
    # Nothing but its rows can speak for a file of another writer.
    rows = reader.read_groups(table.spec.columns.names)
    digests = window_digests(table.spec.sort_columns[1], windows)(rows)
    if ours and digests != reader.digests:
        raise corrupt(
            paths[0],
            f"its rows have digest {Digest.sum(digests.values())}, but its footer says "
            f"{Digest.sum(reader.digests.values())}",
        )
    return digests, rows.num_rows
