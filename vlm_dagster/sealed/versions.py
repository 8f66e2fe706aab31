"""Which version sealed a window, and which is the first to cover it: facts of the log."""

from __future__ import annotations

from collections.abc import Callable, Collection

from vlm_dagster.errors import WatermarkError
from vlm_dagster.sealed.log import LogReader, TableState, lock_id
from vlm_dagster.sealed.spec import TableSpec
from vlm_dagster.windows import Window, format_us

__all__ = ["Versions"]


class Versions:
    """Answers from the log of one table.

    Args:
        newest: gives the present state.
    """

    def __init__(
        self, uri: str, spec: TableSpec, log: LogReader, newest: Callable[[], TableState]
    ) -> None:
        self._uri = uri
        self._spec = spec
        self._log = log
        self._newest = newest

    def sealing(self, window: Window) -> int:
        """The version that sealed a window as it is now: its present revision."""
        now = self._newest().sealed.get(window.index)

        def holds(state: TableState) -> bool:
            found = state.sealed.get(window.index)
            return found is not None and now is not None and found.revision >= now.revision

        return self._first_version(holds, f"window {window.key}", window)

    def covering(self, window: Window) -> int:
        """The first version whose watermark covers a window: it, and all before it, are sealed
        there as they are now. A fact of the log: only a correction changes it.

        Raises:
            WatermarkError: no version covers it yet.
        """
        now = [one for one in self._newest().covered if one.window.index <= window.index]

        def holds(state: TableState) -> bool:
            return state.covers(window) and all(
                state.sealed[one.window.index].revision >= one.revision for one in now
            )

        return self._first_version(holds, f"window {window.key}", window)

    def all_sealing(self, windows: Collection[Window]) -> dict[str, int]:
        """`sealing` of many windows, by key, with each commit read once."""
        sealed_in = self._sealed_in()
        found: dict[str, int] = {}
        for window in windows:
            version = sealed_in.get(window.index)
            found[window.key] = self.sealing(window) if version is None else version
        return found

    def all_covering(self, windows: Collection[Window]) -> dict[str, int]:
        """`covering` of many windows, by key, with each commit read once.

        Raises:
            WatermarkError: one of them is not covered yet.
        """
        state = self._newest()
        wanted = {window.index for window in windows}
        sealed_in = self._sealed_in()
        found: dict[str, int] = {}
        newest = 0
        for sealed in state.covered:
            index = sealed.window.index
            if index not in sealed_in:  # the log's beginning was cleaned away
                found.clear()
                break
            newest = max(newest, sealed_in[index])
            if index in wanted:
                found[sealed.window.key] = newest
        for window in sorted(windows):
            if window.key not in found:
                found[window.key] = self.covering(window)
        return found

    def _sealed_in(self) -> dict[int, int]:
        """Window index -> the version that sealed its present revision, as far as the commits are
        still there."""
        locks = {lock_id(sealed.window): sealed for sealed in self._newest().sealed.values()}
        found: dict[int, int] = {}
        for version, transactions in self._log.commits_after(-1):
            for app_id, revision in transactions.items():
                if app_id in locks and locks[app_id].revision == revision:
                    found.setdefault(locks[app_id].window.index, version)
        return found

    def _first_version(
        self, holds: Callable[[TableState], bool], asked: str, window: Window
    ) -> int:
        def at(version: int) -> TableState:
            return self._log.state(version, self._spec.grid, self._spec.start_index, ledger=False)

        state = self._newest()
        if not holds(state):
            mark = state.watermark_us
            raise WatermarkError(
                table=self._uri,
                version=state.version,
                watermark="(nothing sealed)" if mark is None else format_us(mark),
                asked=asked,
                missing=[w.key for w in state.missing_through(window)],
            )
        # Both conditions, once true, stay true: windows are never unsealed. A version whose log was
        # cleaned away is older than all that remain, and nobody can pin it: it does not count.
        low, high = 0, state.version
        while low < high:
            middle = (low + high) // 2
            try:
                found = holds(at(middle))
            except FileNotFoundError:
                found = False
            if found:
                high = middle
            else:
                low = middle + 1
        return low
