"""The IO manager of histories: commits staged windows, loads pinned snapshots."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from vlm_dagster.history import HistoryStore, SnapshotRef
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.handles import Sealing
from vlm_dagster.io_managers.sealing import commit, sealed_facts, summary_facts
from vlm_dagster.io_managers.tables import TableIOManager, input_keys
from vlm_dagster.schema import FeatureGroup
from vlm_dagster.sealed.stripes import DEFAULT_EDGES
from vlm_dagster.windows import Cadence

__all__ = ["VlmHistoryIOManager"]


class VlmHistoryIOManager(TableIOManager):
    """Commits the windows that an asset staged, and loads histories as pinned `SnapshotRef`s.

    An asset returns what `HistoryStore.stage` gave (or a list of these, one a partition). Downstream,
    an input of one partition is a `SnapshotRef` of the first version whose watermark covers that
    partition: a fact of the Delta log that later commits do not change. Never "latest". An input of
    several partitions is a dict from partition key to such a ref.
    """

    def store(self, asset_key: dg.AssetKey) -> HistoryStore:
        """The store of an asset that was sealed before."""
        return HistoryStore.open(self.table_uri(asset_key), storage_options=self.options)

    def create_store(
        self,
        asset_key: dg.AssetKey,
        group: FeatureGroup,
        *,
        num_buckets: int,
        windows: Cadence,
        start: str | None,
        bands: Sequence[int] = DEFAULT_EDGES,
        portable: bool = False,
    ) -> HistoryStore:
        """The store of an asset; created if it is not there, checked against the declaration if so."""
        return HistoryStore.create(
            self.table_uri(asset_key),
            group,
            num_buckets=num_buckets,
            windows=windows,
            start=start,
            bands=bands,
            portable=portable,
            storage_options=self.options,
        )

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        with told_to_dagster():
            sealing = Sealing.of(obj)
            store = self.store(context.asset_key)
            keys = context.asset_partition_keys if context.has_asset_partitions else None
            commit(store, sealing, keys)
            sealing.watermark_us = store.snapshot().watermark_us
        if len(sealing.sealed) == 1:
            context.add_output_metadata(
                sealed_facts(store, sealing.sealed[0], sealing.watermark_us)
            )
        else:
            context.add_output_metadata(summary_facts(store, sealing))

    def load_input(self, context: dg.InputContext) -> SnapshotRef | dict[str, SnapshotRef]:
        with told_to_dagster():
            store = self.store(context.asset_key)
            keys = input_keys(context)
            refs = self.snapshots(store, keys)
        return next(iter(refs.values())) if len(refs) == 1 else refs

    def snapshots(self, store: HistoryStore, keys: list[str]) -> dict[str, SnapshotRef]:
        """For each window the snapshot that first covers it."""
        refs: dict[int, SnapshotRef] = {}
        versions = store.versions_covering(keys)
        for version in versions.values():
            if version not in refs:
                refs[version] = store.ref(version)
        return {key: refs[versions[key]] for key in keys}
