"""The IO manager of pointer datasets: commits staged windows, loads pinned ones."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from vlm_dagster.errors import WindowError
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.handles import Sealing
from vlm_dagster.io_managers.sealing import commit, sealed_facts, summary_facts
from vlm_dagster.io_managers.tables import TableIOManager, input_keys
from vlm_dagster.pointers import PointerDataset, PointerRef, PointerSpec
from vlm_dagster.windows import Cadence

__all__ = ["VlmPointerIOManager"]


class VlmPointerIOManager(TableIOManager):
    """Commits the windows that an asset staged, and loads pointers as one pinned `PointerRef`.

    The ref names the sealed ones among the partitions that an input maps to, at the version that
    sealed the newest of them. An input of a single partition has to be sealed.
    """

    def dataset(self, asset_key: dg.AssetKey) -> PointerDataset:
        """The dataset of an asset that was sealed before."""
        return PointerDataset.open(self.table_uri(asset_key), storage_options=self.options)

    def part_of(self, ref: PointerRef, windows: Sequence[str]) -> PointerRef:
        """A pin of some of a ref's windows, at the version that sealed the newest of them."""
        dataset = PointerDataset.open(ref.uri, storage_options=self.options)
        return _pinned(dataset, windows)

    def create_dataset(
        self,
        asset_key: dg.AssetKey,
        spec: PointerSpec,
        *,
        num_buckets: int,
        windows: Cadence,
        start: str | None,
    ) -> PointerDataset:
        """The dataset of an asset; created if it is not there, checked against the declaration if
        so."""
        return PointerDataset.create_from(
            self.table_uri(asset_key),
            spec,
            num_buckets=num_buckets,
            windows=windows,
            start=start,
            storage_options=self.options,
        )

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        with told_to_dagster():
            sealing = Sealing.of(obj)
            dataset = self.dataset(context.asset_key)
            keys = context.asset_partition_keys if context.has_asset_partitions else None
            commit(dataset, sealing, keys)
            sealing.watermark_us = dataset.state().watermark_us
        if len(sealing.sealed) == 1:
            facts = sealed_facts(dataset, sealing.sealed[0], sealing.watermark_us)
            context.add_output_metadata(facts)
        else:
            context.add_output_metadata(summary_facts(dataset, sealing))

    def load_input(self, context: dg.InputContext) -> PointerRef:
        with told_to_dagster():
            dataset = self.dataset(context.asset_key)
            keys = input_keys(context)
            sealed = {found.window.key for found in dataset.state().sealed.values()}
            present = [key for key in keys if key in sealed]
            absent = [key for key in keys if key not in sealed]
            if not present or len(keys) == 1 != len(present):
                raise WindowError(
                    keys[0] if keys else None,
                    f"asset {context.asset_key.to_user_string()} has no sealed window among the "
                    f"{len(keys)} partitions asked for",
                    "Materialize these first.",
                )
            if absent:
                context.log.warning(
                    f"{len(absent)} of {len(keys)} partitions of "
                    f"{context.asset_key.to_user_string()} are not sealed and are left out: "
                    f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
                )
            return _pinned(dataset, present)


def _pinned(dataset: PointerDataset, windows: Sequence[str]) -> PointerRef:
    return dataset.ref(windows, max(dataset.versions_sealing(windows).values()))
