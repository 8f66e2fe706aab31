"""Where a table's files lie: a local folder, or an object store through obstore (optional extra).

Paths handed to a `Storage` are relative to the table's root and use forward slashes. Data files
arrive whole: they are written to a local scratch file first, then put in place in one step, so
nobody ever sees half a file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
import uuid
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import pyarrow as pa

from vlm_dagster.errors import StorageError, TableError

__all__ = ["STAGING", "FileInfo", "Storage", "normalize_uri", "open_storage", "redact"]

# One request for two ranges costs the bytes between them, two cost another round trip: at 50 ms and
# 20 MB/s a connection, they cost the same 1 MB apart.
_GAP_BYTES = 1 << 20
# Beyond, more connections are faster than longer requests.
_REQUEST_BYTES = 16 << 20
_REQUESTS_AT_ONCE = 16

# Delta ignores folders that begin with an underscore, so scratch files there are never data.
STAGING = "_staging"


@dataclass(frozen=True)
class FileInfo:
    """A file: its path relative to the table, size in bytes, and last change in UTC seconds."""

    path: str
    size: int
    modified_s: float


# Azure writes `abfss://CONTAINER@ACCOUNT...`: there, what stands before the @ is no secret.
_CONTAINER_BEFORE_AT = frozenset({"abfs", "abfss", "wasb", "wasbs"})


def redact(uri: str) -> str:
    """The URI without user info, query and fragment, which may carry credentials."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    user_info, at, host = parts.netloc.rpartition("@")
    if at and parts.scheme in _CONTAINER_BEFORE_AT:
        host = f"{user_info.partition(':')[0]}@{host}"
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def normalize_uri(uri: str | os.PathLike[str]) -> str:
    """An absolute local path, or a URL without a trailing slash."""
    text = os.fspath(uri)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if "://" in text:
        parts = urlsplit(text)
        named = parts.username and parts.scheme not in _CONTAINER_BEFORE_AT
        if named or parts.password or parts.query or parts.fragment:
            raise TableError(
                redact(text),
                "the address carries credentials",
                "Pass them as storage_options, which are never stored or shown.",
            )
        return text.rstrip("/")
    if not text or re.search(r"[\x00\n]", text):
        raise TableError(repr(text), "not a path", "Give a folder or a URL.")
    if unquote(text) != text:
        raise TableError(
            text, "the path holds what Delta takes for an escape (%XX)", "Rename the folder."
        )
    return str(Path(text).absolute())


class Storage(Protocol):
    """What the tables need of a place for files."""

    @property
    def uri(self) -> str: ...
    @property
    def fetches(self) -> bool:
        """Whether reading takes round trips, so that it pays to say early what will be read."""
        ...

    def open_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Any:
        """A pyarrow file of which only these bytes `[start, end)` will be read; where storage
        fetches, it begins to at once. FileNotFoundError, now or at the first read, when there is
        none."""
        ...

    def open_input(self, path: str) -> Any:
        """A random-access pyarrow file. FileNotFoundError when there is none."""
        ...

    def read_tail(self, path: str, num_bytes: int) -> bytes:
        """The last so many bytes of a file (or all of it), in one round trip. FileNotFoundError when
        there is none."""
        ...

    def read_bytes(self, path: str) -> bytes: ...
    def size(self, path: str) -> int | None:
        """Bytes, or None when there is no such file."""
        ...

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        """Every file below `prefix`, in no order."""
        ...

    def delete(self, path: str) -> None:
        """Remove one file; fine if it is gone already."""
        ...

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A fresh local folder, removed at the end, from which `put` is cheap."""
        ...

    def put(self, local: Path, path: str) -> None:
        """Move a finished local file into place, durably and in one step."""
        ...

    def put_new(self, data: bytes, path: str) -> bool:
        """Write a small file in one step, unless there is one; returns whether it was written."""
        ...


class LocalStorage:
    """A folder of this machine (or a mount)."""

    fetches = False

    def __init__(self, root: str) -> None:
        self.uri = root
        self._root = Path(root)

    def open_input(self, path: str) -> Any:
        return pa.memory_map(str(self._root / path), "r")

    def open_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Any:
        # Not a memory map: mapping a file's pages costs a tenth of decoding them.
        return pa.OSFile(f"{self._root}/{path}", "r")

    def read_tail(self, path: str, num_bytes: int) -> bytes:
        with (self._root / path).open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(size - num_bytes, 0))
            return file.read()

    def read_bytes(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def size(self, path: str) -> int | None:
        try:
            return (self._root / path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        root = str(self._root)
        for folder, _, names in os.walk(os.path.join(root, prefix)):
            # By hand: a Path for every file costs more than looking at it.
            inside = os.path.relpath(folder, root).replace(os.sep, "/")
            below = "" if inside == "." else f"{inside}/"
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    stat = os.stat(os.path.join(folder, name))
                    yield FileInfo(f"{below}{name}", stat.st_size, stat.st_mtime)

    def delete(self, path: str) -> None:
        (self._root / path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        folder = self._root / STAGING / uuid.uuid4().hex
        try:
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise StorageError(self.uri, "making a scratch folder", error) from error
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, local: Path, path: str) -> None:
        target = self._root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with local.open("rb") as file:
                os.fsync(file.fileno())
            # Replacing is harmless: the name is the hash of the bytes.
            local.replace(target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StorageError(self.uri, f"writing {path}", error) from error

    def put_new(self, data: bytes, path: str) -> bool:
        target = self._root / path
        whole = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with whole.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(whole, target)  # unlike a rename, it never replaces
            except FileExistsError:
                return False
            finally:
                whole.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(self.uri, f"writing {path}", error) from error
        return True


def coalesce(ranges: Sequence[tuple[int, int]], *, gap: int, limit: int) -> list[tuple[int, int]]:
    """Byte ranges `[start, end)` as few requests, in order, which cover them: neighbours at most `gap`
    bytes apart become one unless that is longer than `limit`."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start - found[-1][1] <= gap and max(end, found[-1][1]) - found[-1][0] <= limit:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Errors of an object store as ours; FileNotFoundError stays what it is."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError:
        raise
    except BaseError as error:
        raise StorageError(path, "reading it", error, writing=False) from error


class _RangeFile(io.RawIOBase):
    """An object as a file. What is known to be read is on its way from the start; every other read is
    one ranged request."""

    def __init__(
        self, store: Any, path: str, parts: Sequence[tuple[int, int, Future[Any]]] = ()
    ) -> None:
        super().__init__()
        self._store = store
        self._path = path
        self._parts = list(parts)
        self._starts = [start for start, _, _ in parts]
        self._at = 0

    @cached_property
    def _size(self) -> int:
        with _reading(self._path):
            return int(self._store.head(self._path)["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            self._at = offset
        elif whence == io.SEEK_CUR:
            self._at += offset
        elif self._parts:  # somebody wants to know the size: as far as they will read is enough
            self._at = self._parts[-1][1] + offset
        else:
            self._at = self._size + offset
        return self._at

    def read(self, size: int | None = -1) -> Any:
        """Bytes, without a copy where they were fetched already."""
        number = bisect_right(self._starts, self._at) - 1
        if size is not None and size >= 0 and number >= 0:
            start, end, fetched = self._parts[number]
            if self._at + size <= end:
                low = self._at - start
                self._at += size
                with _reading(self._path):
                    return memoryview(fetched.result())[low : low + size]
        return super().read(-1 if size is None else size)

    def readinto(self, buffer: Any) -> int:
        num_bytes = min(len(buffer), self._size - self._at)
        if num_bytes <= 0:
            return 0
        with _reading(self._path):
            found = self._store.get_range(self._path, start=self._at, length=num_bytes)
        buffer[:num_bytes] = memoryview(found)
        self._at += num_bytes
        return num_bytes

    def close(self) -> None:
        for _, _, fetched in self._parts:
            fetched.cancel()
        self._parts = []
        super().close()


class ObjectStorage:
    """An object store (S3, GCS, Azure, ...) through obstore, with deltalake's own options."""

    fetches = True

    def __init__(self, uri: str, options: Mapping[str, str]) -> None:
        try:
            from obstore import store as stores
        except ImportError:
            raise TableError(
                uri, "reading object stores needs obstore", "Install vlm-dagster[remote]."
            ) from None
        self.uri = uri
        # Options that are deltalake's own, or the HTTP client's, are not the store's.
        known = {key.lower(): value for key, value in options.items()}
        known.pop("aws_conditional_put", None)
        known.pop("aws_s3_allow_unsafe_rename", None)
        plain_http = known.pop("allow_http", None) or known.pop("aws_allow_http", None)
        client = {"allow_http": True} if str(plain_http).lower() in ("1", "true", "yes") else None
        from_url: Any = stores.from_url
        self._store: Any = from_url(uri, config=known, client_options=client)
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="vlm-fetch")

    def open_input(self, path: str) -> Any:
        return pa.PythonFile(_RangeFile(self._store, path), mode="r")

    def open_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Any:
        fetched = [
            (start, end, self._pool.submit(self._store.get_range, path, start=start, end=end))
            for start, end in coalesce(ranges, gap=_GAP_BYTES, limit=_REQUEST_BYTES)
        ]
        return pa.PythonFile(_RangeFile(self._store, path, fetched), mode="r")

    def read_tail(self, path: str, num_bytes: int) -> bytes:
        try:
            found = self._store.get(path, options={"range": {"suffix": num_bytes}})
        except FileNotFoundError:
            raise
        except Exception:  # Azure has no such request
            with _reading(path):
                size = int(self._store.head(path)["size"])
                start = max(size - num_bytes, 0)
                return bytes(self._store.get_range(path, start=start, end=size))
        with _reading(path):
            return bytes(found.bytes())

    def read_bytes(self, path: str) -> bytes:
        with _reading(path):
            return bytes(self._store.get(path).bytes())

    def size(self, path: str) -> int | None:
        try:
            with _reading(path):
                return int(self._store.head(path)["size"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        with _reading(prefix or self.uri):
            for chunk in self._store.list(prefix or None):
                for meta in chunk:
                    yield FileInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.delete(path)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="vlm-staging-") as folder:
            yield Path(folder)

    def put(self, local: Path, path: str) -> None:
        try:
            self._store.put(path, local)
        except Exception as error:
            raise StorageError(self.uri, f"writing {path}", error) from error
        local.unlink()

    def put_new(self, data: bytes, path: str) -> bool:
        from obstore.exceptions import AlreadyExistsError

        try:
            self._store.put(path, data, mode="create")
        except AlreadyExistsError:
            return False
        except Exception as error:
            raise StorageError(self.uri, f"writing {path}", error) from error
        return True


def open_storage(uri: str, options: Mapping[str, str] | None = None) -> Storage:
    """The storage of a table at a normalized URI."""
    if "://" in uri:
        return ObjectStorage(uri, options or {})
    return LocalStorage(uri)
