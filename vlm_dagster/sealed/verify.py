"""Are the sealed files what they were? Sizes against the log, bytes against names, rows against
digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from vlm_dagster.errors import CorruptFileError
from vlm_dagster.hashing import Digest, digest_rows
from vlm_dagster.sealed.table import SealedTable

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
    whose digests add up to the window's sealed digest. `deep` also decodes every row and
    recomputes the digest from it.

    Args:
        windows: keys to look at; all if None.
        progress: called with the bytes of each file when it is done.
    """
    state = table.state(version)
    chosen = [
        sealed
        for sealed in sorted(state.sealed.values(), key=lambda s: s.window.index)
        if windows is None or sealed.window.key in windows
    ]
    segments = {sealed.window.segment: Digest() for sealed in chosen}
    problems: list[str] = []
    num_files = num_bytes = num_rows = 0
    for row in table.files(version).to_pylist():
        if row["segment"] not in segments:
            if windows is None:
                problems.append(f"file {row['path']}: belongs to no sealed window")
            continue
        num_files += 1
        num_bytes += row["size_bytes"]
        try:
            digest, rows = _check_file(table, version, row["path"], row["size_bytes"], deep)
            segments[row["segment"]] += digest
            num_rows += rows
        except CorruptFileError as error:
            problems.append(str(error))
        if progress is not None:
            progress(row["size_bytes"])
    if not problems:
        problems.extend(
            f"window {sealed.window.key} of {table.uri}: sealed with digest {sealed.digest}, but "
            f"its files add up to {segments[sealed.window.segment]}"
            for sealed in chosen
            if str(segments[sealed.window.segment]) != sealed.digest
        )
    return VerifyReport(
        table.uri, version, len(chosen), num_files, num_bytes, num_rows, tuple(problems)
    )


def _check_file(
    table: SealedTable, version: int, path: str, size: int, deep: bool
) -> tuple[Digest, int]:
    def corrupt(problem: str) -> CorruptFileError:
        return CorruptFileError(table=table.uri, path=path, version=version, problem=problem)

    found = table.storage.size(path)
    if found is None:
        raise corrupt("is missing")
    if found != size:
        raise corrupt(f"has {found} bytes, but {size} were sealed")
    name = path.rpartition("/")[2].removesuffix(".parquet")
    with table.storage.open_input(path) as source:
        hasher = hashlib.sha256()
        while chunk := source.read(1 << 22):
            hasher.update(chunk)
    if hasher.hexdigest() != name:
        raise corrupt(f"its bytes hash to {hasher.hexdigest()}, not to its name")
    reader = table.reader(path, version)
    if not deep:
        return reader.digest, 0
    columns = table.spec.columns.names
    rows = reader.read_groups(columns)
    digest = digest_rows(rows)
    if digest != reader.digest:
        raise corrupt(f"its rows have digest {digest}, but its footer says {reader.digest}")
    return digest, rows.num_rows
