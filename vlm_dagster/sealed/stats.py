"""What readers have read: counters that anybody may look at and set back."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

__all__ = ["ReadStats"]


@dataclass
class ReadStats:
    """Counters shared by the readers of a table; safe to add to from many threads.

    Attributes:
        rows_decoded: rows of all row groups read, needed or not.
        data_bytes: of the pages read, as stored; 0 unless `counts_bytes`.
        footer_bytes: of the footers read.
        num_reads: calls that decoded rows.
        counts_bytes: whether to add up `data_bytes`, which costs a look at every page's size.
    """

    rows_decoded: int = 0
    data_bytes: int = 0
    footer_bytes: int = 0
    num_reads: int = 0
    counts_bytes: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count_rows(self, rows: int, num_bytes: int) -> None:
        with self._lock:
            self.rows_decoded += rows
            self.data_bytes += num_bytes
            self.num_reads += 1

    def count_footer(self, num_bytes: int) -> None:
        with self._lock:
            self.footer_bytes += num_bytes

    def reset(self) -> None:
        """All counters to 0."""
        with self._lock:
            self.rows_decoded = self.data_bytes = self.footer_bytes = self.num_reads = 0
