"""Finding input files and reading their bytes, compressed or not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlm_dagster.errors import SourceFormatError

__all__ = ["ByteStream", "InputPath", "find_files", "first_line", "total_size"]

InputPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_COMPRESSION = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_SUFFIXES = ("", ".gz", ".bz2", ".zst", ".lz4")
_FOREIGN = {
    b"PK\x03\x04": ("a zip archive", "Unpack it first and give the file inside."),
    b"PAR1": ("a Parquet file", 'Read it with format="parquet".'),
    b"\xff\xfe": ("UTF-16 text", "Convert it to UTF-8."),
    b"\xfe\xff": ("UTF-16 text", "Convert it to UTF-8."),
}


def find_files(path: InputPath, names: Sequence[str]) -> tuple[str, ...]:
    """The input files behind a path or a list of paths, folders expanded, in name order.

    Args:
        path: files, folders, or a list of them.
        names: glob patterns of the files to take from a folder, plain or compressed.

    Raises:
        SourceFormatError: a path does not exist, a folder holds no such file, or holds one
            twice (plain and compressed), which would count its events twice.
    """
    given = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not given:
        raise SourceFormatError(
            "no input", "the list of paths is empty", line=None, value=None,
            way_out="Give a file or a folder.",
        )  # fmt: skip
    found: list[Path] = []
    for item in map(Path, given):
        if item.is_dir():
            found += _in_folder(item, names)
        elif item.exists():
            found.append(item)
        else:
            raise SourceFormatError(
                str(item), "there is no such file or folder", line=None, value=None,
                way_out="Check the path; relative ones count from the working directory.",
            )  # fmt: skip
    _refuse_twins(found)
    return tuple(str(item) for item in found)


def _in_folder(folder: Path, names: Sequence[str]) -> list[Path]:
    patterns = [name + suffix for name in names for suffix in _SUFFIXES]
    files = sorted({file for name in patterns for file in folder.glob(name) if file.is_file()})
    if not files:
        raise SourceFormatError(
            str(folder), f"the folder holds no {' or '.join(names)}", line=None, value=None,
            way_out="Give the folder that the files lie in directly, or the files themselves; "
            "they may be compressed (.gz).",
        )  # fmt: skip
    return files


def _refuse_twins(files: Iterable[Path]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        plain = str(file.resolve())
        for suffix in _SUFFIXES[1:]:
            plain = plain.removesuffix(suffix)
        if plain in seen:
            raise SourceFormatError(
                str(file), f"is the same file as {seen[plain]}, by its name", line=None, value=None,
                way_out="Its events would count twice: remove one of the two.",
            )  # fmt: skip
        seen[plain] = file


def total_size(paths: Iterable[str]) -> int:
    """Bytes of these files as they are stored."""
    return sum(os.stat(path).st_size for path in paths)


class ByteStream:
    """The decompressed bytes of one file. The first bytes tell the compression, not the name.

    `num_read` counts the bytes taken from the stored (compressed) file so far.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._raw: Any = pa.OSFile(path, "rb")
        except OSError as error:
            raise SourceFormatError(
                path, f"cannot be read: {error.strerror or error}", line=None, value=None,
                way_out="Check the path and its permissions.",
            ) from None  # fmt: skip
        magic = self._raw.read(4)
        for start, (what, way_out) in _FOREIGN.items():
            if magic.startswith(start):
                self._raw.close()
                raise SourceFormatError(
                    path, f"is {what}, not text", line=None, value=None, way_out=way_out
                )
        self._raw.seek(0)
        codec = next((c for m, c in _COMPRESSION.items() if magic.startswith(m)), None)
        self._codec = codec
        self._bytes = self._raw if codec is None else pa.CompressedInputStream(self._raw, codec)

    @property
    def num_read(self) -> int:
        return int(self._raw.tell())

    def read(self, num_bytes: int, line: int) -> bytes:
        """The next bytes, b"" at the end. `line` is where an error is said to be."""
        try:
            return bytes(self._bytes.read(num_bytes))
        except (OSError, pa.ArrowInvalid) as error:
            if self._codec is None:
                problem, way_out = f"cannot be read: {error}", "Check the disk or the mount."
            else:
                problem = f"the {self._codec} stream is cut off or damaged ({error})"
                way_out = "Fetch the file again; what it decompresses to is not complete."
            raise SourceFormatError(
                self.path, problem, line=line, value=None, way_out=way_out
            ) from None

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._raw.close()


def first_line(path: str) -> str:
    """The first line of a text file, without its line end or byte order mark.

    Raises:
        SourceFormatError: the file is empty, is not text, or has no line end in 1 MiB.
    """
    limit = 1 << 20
    with ByteStream(path) as stream:
        text = stream.read(limit, line=1)
    if not text:
        raise SourceFormatError(
            path, "the file is empty", line=None, value=None,
            way_out="Remove it from the input, or fetch it again.",
        )  # fmt: skip
    head, line_end, _ = text.partition(b"\n")
    if not line_end and len(text) == limit:
        raise SourceFormatError(
            path, "the first line does not end within 1 MiB", line=1, value=None,
            way_out="This does not look like a text file of rows.",
        )  # fmt: skip
    try:
        return head.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r").decode()
    except UnicodeDecodeError as error:
        raise SourceFormatError(
            path, f"not UTF-8 text (byte {error.start + 1} of the line)", line=1,
            value=head[error.start : error.start + 4], way_out="Convert the file to UTF-8.",
        ) from None  # fmt: skip
