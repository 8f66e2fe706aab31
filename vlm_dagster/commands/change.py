"""`vlm-dagster erase`, `drop` and `correct`: the explicit acts that change what a table holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from vlm_dagster.errors import SourceFormatError
from vlm_dagster.history.dropping import DropReport
from vlm_dagster.retention.erasing import ErasureReport
from vlm_dagster.sealed import Sealed

__all__ = [
    "UserIds",
    "drop_facts",
    "erasure_facts",
    "existing",
    "read_user_ids",
    "sealed_facts",
    "show_correction",
    "show_drop",
    "show_erasure",
]


@dataclass(frozen=True)
class UserIds:
    """User ids as words of a text file: `(line, word)`, lines counted from 1."""

    name: str
    words: tuple[tuple[int, str], ...]

    def typed(self, kind: pa.DataType) -> pa.Array:
        """As ids of a table.

        Raises:
            SourceFormatError: a word is no id of that type.
        """
        if not pa.types.is_integer(kind):
            return pa.array([word for _, word in self.words], kind)
        ids = []
        for line, word in self.words:
            try:
                ids.append(pa.scalar(int(word), kind).as_py())
            except (ValueError, pa.ArrowInvalid, OverflowError):
                raise SourceFormatError(
                    self.name,
                    f"no user id of the table, where they are {kind}",
                    line=line,
                    value=word,
                    way_out="Write one id a line. Nobody was erased.",
                ) from None
        return pa.array(ids, kind)


def read_user_ids(file: str) -> UserIds:
    """User ids from a text file, one a line; `-` reads standard input.

    Raises:
        SourceFormatError: the file cannot be read.
    """
    name = "standard input" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceFormatError(
            name, f"cannot be read ({error})", line=None, value=None, way_out="Give a text file."
        ) from None
    words = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return UserIds(name, tuple(pair for pair in words if pair[1]))


def erasure_facts(report: ErasureReport) -> dict[str, Any]:
    """The report as JSON."""
    lost = [{"version": one.version, "holder": str(one)} for one in report.lost]
    return {**vars(report), "segments": list(report.segments), "lost": lost}


def show_erasure(report: ErasureReport, console: Console) -> None:
    """Print the report."""
    if report.dry_run:
        console.print(
            f"{report.uri}: {report.num_users:,} users have {report.num_rows:,} rows in "
            f"{len(report.segments):,} segments; leave --dry-run out to erase them"
        )
        for hold in report.lost:
            console.print(f"cannot be opened afterwards: {hold}, which pins corrected windows")
        return
    console.print(
        f"{report.uri}: erased {report.num_rows:,} rows of {report.num_users:,} users from "
        f"{len(report.segments):,} segments; {report.num_files_deleted:,} files deleted "
        f"({report.num_bytes_deleted:,} bytes)"
    )
    console.print(
        f"audit record {report.id}; version {report.version} is the oldest that can be opened, and "
        "pins to earlier ones open the newest"
    )


def drop_facts(report: DropReport) -> dict[str, Any]:
    """The report as JSON."""
    facts = asdict(report)
    return {
        **facts,
        "windows": list(report.windows),
        "kept_for_segment": list(report.kept_for_segment),
    }


def show_drop(report: DropReport, console: Console) -> None:
    """Print the report."""
    if report.kept_for_segment:
        console.print(
            f"{report.kept_for_segment[0]} to {report.kept_for_segment[-1]} stay: they lie in one "
            "segment with later windows"
        )
    if not report.windows:
        console.print("nothing to drop")
        return
    what = (
        f"{len(report.windows):,} windows, {report.windows[0]} to {report.windows[-1]}, "
        f"{report.num_rows:,} events, {report.num_files:,} files, {report.num_bytes:,} bytes"
    )
    if report.dry_run:
        console.print(f"would drop {what} (--delete)")
    else:
        console.print(
            f"dropped {what}; the files go when the versions that name them are collected "
            "(vlm-dagster gc)"
        )


def sealed_facts(sealed: Sealed) -> dict[str, Any]:
    """The outcome of a correction as JSON."""
    return {**asdict(sealed), "window": sealed.window.key}


def show_correction(sealed: Sealed, before: str, console: Console) -> None:
    """Print the outcome; `before` is the digest that was replaced."""
    if sealed.reused:
        console.print(f"window {sealed.window.key} holds just this content: nothing was changed")
        return
    console.print(
        f"window {sealed.window.key} is revision {sealed.revision} from version {sealed.version} on: "
        f"{sealed.num_events:,} events, digest {sealed.digest}, instead of {before}; pins from "
        "before keep replaying the old one"
    )


def existing(files: Sequence[str]) -> list[str]:
    """Parquet files by path, each of which must be there."""
    for file in files:
        if "://" not in file and not Path(file).exists():
            raise SourceFormatError(
                file, "is not there", line=None, value=None, way_out="Give Parquet files."
            )
    return list(files)
