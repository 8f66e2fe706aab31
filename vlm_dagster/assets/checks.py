"""Asset checks: what was sealed is intact, and no pointer sees the future. They block downstream.

In a partitioned run they look at the partitions of the run; run on their own, at every sealed window.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import dagster as dg
import pyarrow as pa
from deltalake.exceptions import DeltaError

from vlm_dagster.assets.reference import find_leaks, newest_requests_us
from vlm_dagster.errors import DroppedError, SchemaError, VlmError
from vlm_dagster.history import PinOpener
from vlm_dagster.io_managers.history import VlmHistoryIOManager
from vlm_dagster.io_managers.pointers import VlmPointerIOManager
from vlm_dagster.io_managers.tables import io_manager_of
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.sealed import VerifyReport
from vlm_dagster.windows import format_us

__all__ = ["history_checks", "pointer_checks"]

INTACT = "sealed_files_intact"
WATERMARK = "within_watermark"
LEAKAGE = "no_leakage"

_INTACT_MEANS = (
    "Every file of the windows is there, has the size and the SHA-256 it was sealed with, and its "
    "rows add up to the window's sealed digest."
)
_WATERMARK_MEANS = (
    "Every pin opens and holds what was pinned, and no request was made after the instant up to "
    "which its history is complete."
)
_LEAKAGE_MEANS = (
    "On a sample: a pointer ends exactly where the events that were available before the request "
    "end, worked out anew by a plain reference, and the event that an example is about is not in "
    "its own history."
)


def history_checks(
    history: dg.AssetsDefinition, *, blocking: bool = True
) -> list[dg.AssetChecksDefinition]:
    """The checks of an asset made by `history_asset`: sealed files intact."""
    io_manager_key = _io_manager_key(history, "history")

    @dg.multi_asset_check(
        name=f"{history.key.to_python_identifier()}_checks",
        specs=[_spec(history, INTACT, _INTACT_MEANS, blocking)],
        required_resource_keys={io_manager_key},
    )
    def check_history(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        manager = io_manager_of(context, io_manager_key, VlmHistoryIOManager)

        def intact() -> dg.AssetCheckResult:
            store = manager.store(history.key)
            keys = _windows(context, [sealed.window.key for sealed in store.sealed_windows()])
            return _verified(store.snapshot().verify(windows=keys, deep=True), keys)

        yield _result(INTACT, intact)

    return [check_history]


def pointer_checks(
    pointers: dg.AssetsDefinition, *, num_examples: int = 200, blocking: bool = True
) -> list[dg.AssetChecksDefinition]:
    """The checks of an asset made by `pointer_asset`: sealed files intact, within the watermark, no
    leakage.

    Args:
        num_examples: how many examples the leakage check compares with the reference.
    """
    io_manager_key = _io_manager_key(pointers, "pointers")

    @dg.multi_asset_check(
        name=f"{pointers.key.to_python_identifier()}_checks",
        specs=[
            _spec(pointers, INTACT, _INTACT_MEANS, blocking),
            _spec(pointers, WATERMARK, _WATERMARK_MEANS, blocking),
            _spec(pointers, LEAKAGE, _LEAKAGE_MEANS, blocking),
        ],
        required_resource_keys={io_manager_key},
    )
    def check_pointers(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        manager = io_manager_of(context, io_manager_key, VlmPointerIOManager)

        def snapshot() -> PointerSnapshot:
            newest = manager.dataset(pointers.key).snapshot()
            keys = _windows(context, [sealed.window.key for sealed in newest.windows])
            return manager.dataset(pointers.key).snapshot(keys, newest.version)

        def intact() -> dg.AssetCheckResult:
            found = snapshot()
            return _verified(found.verify(deep=True), [s.window.key for s in found.windows])

        def within_watermark() -> dg.AssetCheckResult:
            return _within_watermark(snapshot(), manager)

        def no_leakage() -> dg.AssetCheckResult:
            report = find_leaks(snapshot(), manager.options, num_examples=num_examples)
            return _told(
                report.problems,
                {"num_examples": report.num_examples, "num_events_read": report.num_events},
            )

        yield _result(INTACT, intact)
        yield _result(WATERMARK, within_watermark)
        yield _result(LEAKAGE, no_leakage)

    return [check_pointers]


def _within_watermark(
    snapshot: PointerSnapshot, manager: VlmPointerIOManager
) -> dg.AssetCheckResult:
    problems: list[str] = []
    pins = {pin for found in snapshot.pins().values() for pin in found}
    opened = PinOpener(manager.options)
    num_dropped = 0
    for pin in sorted(pins, key=lambda p: (p.uri, p.version)):
        try:
            opened(pin)
        except DroppedError:  # by age, on purpose: a loader refuses what needs it
            num_dropped += 1
        except VlmError as error:
            problems.append(str(error))
    requests = newest_requests_us(snapshot, manager.options)
    for sealed in snapshot.windows:
        newest = requests.get(sealed.window.key)
        for group, pin in snapshot.pins_of(sealed.window.key).items():
            if newest is not None and (pin.watermark_us is None or newest > pin.watermark_us):
                mark = "nothing" if pin.watermark_us is None else format_us(pin.watermark_us)
                problems.append(
                    f"window {sealed.window.key}: a request at {format_us(newest)}, but the pinned "
                    f"history of {group} (version {pin.version}) is complete up to {mark}"
                )
    facts = {"num_pins": len(pins), "num_pins_dropped": num_dropped}
    return _told(problems, {**facts, "num_windows": len(snapshot.windows)})


def _windows(context: dg.AssetCheckExecutionContext, sealed: list[str]) -> list[str]:
    """The partitions of the run; every sealed window where the run has none."""
    if context.has_partition_key or context.has_partition_key_range:
        keys = list(context.partition_keys)
        lacking = sorted(set(keys) - set(sealed))
        if lacking:
            raise SchemaError(
                f"window {lacking[0]!r} is not sealed", "Materialize the partition, then check it."
            )
        return keys
    return sealed


def _verified(report: VerifyReport, keys: Sequence[str]) -> dg.AssetCheckResult:
    return _told(
        report.problems,
        {
            "version": report.version,
            "num_windows": len(keys),
            "num_files": report.num_files,
            "num_bytes": report.num_bytes,
            "num_rows": report.num_rows,
        },
    )


def _told(problems: Iterable[str], facts: dict[str, int]) -> dg.AssetCheckResult:
    found = list(problems)
    metadata: dict[str, Any] = {**facts, "num_problems": len(found)}
    if found:
        shown = "\n".join(f"- {problem}" for problem in found[:20])
        more = f"\n- ... and {len(found) - 20} more" if len(found) > 20 else ""
        metadata["problems"] = dg.MetadataValue.md(shown + more)
    return dg.AssetCheckResult(
        passed=not found, metadata=metadata, description=found[0] if found else None
    )


def _result(name: str, look: Callable[[], dg.AssetCheckResult]) -> dg.AssetCheckResult:
    """The outcome of a check. What cannot even be looked at has failed it."""
    try:
        found = look()
    except (VlmError, DeltaError, pa.ArrowException, OSError) as error:
        found = _told([f"{type(error).__name__}: {error}"], {})
    return found._replace(check_name=name)


def _spec(
    asset: dg.AssetsDefinition, name: str, description: str, blocking: bool
) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=asset.key, description=description, blocking=blocking)


def _io_manager_key(asset: dg.AssetsDefinition, kind: str) -> str:
    metadata = asset.metadata_by_key[asset.key]
    if metadata.get("vlm/kind") != kind:
        raise SchemaError(
            f"asset {asset.key.to_user_string()} was not made by {kind.rstrip('s')}_asset",
            "Pass what that factory returned.",
        )
    return str(metadata["vlm/io_manager_key"])
