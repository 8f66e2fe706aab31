"""What a file says of itself is checked before it is believed: the layout follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from strategies import history_of, many_events

from vlm_dagster import HistoryStore
from vlm_dagster.errors import CorruptFileError, StorageError
from vlm_dagster.storage import LocalStorage

EVENTS = many_events(seed=2, num_events=400, num_users=8)


def rewrite_header(path: Path, old: bytes, new: bytes) -> None:
    """Change the header in place, to as many bytes."""
    raw = path.read_bytes()
    assert raw.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(raw.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"bands": [1, 3, 8]', b'"bands": [1, 4, 8]'),
        (b'"bands": [1, 3, 8]', b'"bands": [3, 1, 8]'),
        (b'"striped": true', b'"striped": null'),
    ],
)
def test_one_wrong_digit_in_the_header_is_damage(tmp_path: Path, old: bytes, new: bytes) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=[0], num_buckets=1)
    (path,) = Path(store.uri).glob("segment=*/*/*.parquet")
    header = pq.read_metadata(path).metadata[b"vlm.segment"]
    assert json.loads(header)["bands"] == [1, 3, 8]
    rewrite_header(path, old, new)
    with pytest.raises(CorruptFileError, match="damaged header"):
        HistoryStore.open(store.uri).snapshot().read([1, 2])


def test_storage_that_refuses_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=[0], num_buckets=1)
    snapshot = HistoryStore.open(store.uri).snapshot()
    assert snapshot.user_ids()

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(LocalStorage, "open_ranges", refuse)
    with pytest.raises(StorageError, match=r"reading segment=.*Too many open files.*Repair access"):
        snapshot.read([1, 2])
