"""What was sealed and is no longer there: the ledger of erased users and dropped windows.

The facts of a window never change, so that pins stay true; the ledger says what has left since.
Window by window, digest by digest, what was sealed is what the files hold plus what is gone.

A user's events that are gone are always the oldest of the history. The ledger keeps how many they
are, so the position of every event that is left stays what it was. Of erased users it knows no
id, only a salted 64-bit word, which tells that an id is among them if one has the id.

Two kinds of sidecar hold it: `_gone/SHA.json` the windows and the record of removals, and for each
bucket `_gone/SHA.arrow` the users. The transaction `vlm.gone` counts the ledger's editions, and
`vlm.gone/EDITION/NAME` names the newest.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import Transaction

from vlm_dagster.hashing import Digest, id_words, mix64
from vlm_dagster.sealed.sidecar import naming, put_sidecar, read_named, read_sidecar
from vlm_dagster.storage import Storage

__all__ = ["Gone", "GoneRows", "GoneUsers", "Removal", "read_gone", "user_words"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

GONE_ID = "vlm.gone"
_FOLDER = "_gone"
_FORMAT = 1


@dataclass(frozen=True)
class Removal:
    """The audit record of one removal.

    Attributes:
        id: tells removals apart; an erasure asked for again goes on under its own.
        kind: "erasure" of users, or "drop" of the oldest windows.
        reason: as given.
        at: when it began, ISO 8601.
        num_users: of an erasure: users asked for.
        num_rows: rows removed so far.
        through: the last window (by key) that it covers.
        done: whether it is complete; False while it goes on, or after it was killed.
    """

    id: str
    kind: Literal["erasure", "drop"]
    reason: str
    at: str
    num_users: int
    num_rows: int
    through: str
    done: bool


@dataclass(frozen=True)
class Gone:
    """The ledger at one version.

    Attributes:
        edition: how often it was written.
        windows: by segment name of a window, the revision that rows left, and their digest.
        buckets: by bucket, the sidecar of its users.
        removals: oldest first.
        salt: of the erased users' words.
    """

    edition: int = 0
    windows: Mapping[str, tuple[int, Digest]] = field(default_factory=dict)
    buckets: Mapping[int, str] = field(default_factory=dict)
    removals: tuple[Removal, ...] = ()
    salt: int = 0

    def of(self, window: str, revision: int) -> Digest:
        """The digest of the rows that left a revision of a window."""
        found = self.windows.get(window)
        return found[1] if found is not None and found[0] == revision else Digest()

    def removing(self, rows: Mapping[str, tuple[int, Digest]]) -> Gone:
        """With more rows gone: by segment name of a window, its revision and their digest."""
        windows = dict(self.windows)
        for name, (revision, digest) in rows.items():
            if digest.num_rows:
                windows[name] = (revision, self.of(name, revision) + digest)
        return replace(self, windows=windows)

    def recording(self, removal: Removal) -> Gone:
        """With a removal added, or brought up to date."""
        others = tuple(one for one in self.removals if one.id != removal.id)
        return replace(self, removals=(*others, removal))

    def salted(self) -> Gone:
        """With a salt, which is chosen once in the life of a table."""
        return self if self.salt else replace(self, salt=secrets.randbits(63) | 1)

    def write(self, storage: Storage) -> tuple[Gone, list[Transaction]]:
        """Put the next edition in place; returns it and what the commit that needs it must carry."""
        written = replace(self, edition=self.edition + 1)
        facts = {
            "format": _FORMAT,
            "edition": written.edition,
            "salt": f"{self.salt:016x}",
            "windows": {n: [r, str(d)] for n, (r, d) in sorted(self.windows.items())},
            "buckets": {str(bucket): path for bucket, path in sorted(self.buckets.items())},
            "removals": [asdict(one) for one in self.removals],
        }
        data = json.dumps(facts, sort_keys=True).encode()
        path = put_sidecar(storage, _FOLDER, data, ".json")
        return written, naming(GONE_ID, written.edition, path)


def read_gone(storage: Storage, transactions: Mapping[str, int]) -> Gone:
    """The ledger, from the transactions of a version."""
    facts = read_named(storage, transactions, GONE_ID, _FOLDER, _FORMAT)
    if facts is None:
        return Gone()
    return Gone(
        edition=facts["edition"],
        windows={n: (r, Digest.parse(d)) for n, (r, d) in facts["windows"].items()},
        buckets={int(bucket): path for bucket, path in facts["buckets"].items()},
        removals=tuple(Removal(**one) for one in facts["removals"]),
        salt=int(facts["salt"], 16),
    )


def user_words(user_ids: pa.Array, salt: int) -> U64:
    """[U] one salted word a user. Of integers no two are equal; of strings, hardly ever."""
    return mix64(id_words(user_ids) ^ np.uint64(salt))


@dataclass(frozen=True)
class GoneUsers:
    """The users of one bucket with events gone.

    Attributes:
        user_ids, counts, checksums: [D] of dropped windows: ascending ids, how many events of each,
            and the sum of their words (`hashing.event_words`), so that a pointer which begins among
            them at position 0 can still be verified.
        words, word_counts, through: [E] of erased users: ascending words, how many events of each,
            and the index of the last window that was sealed when they were erased.
    """

    user_ids: pa.Array
    counts: I64
    checksums: U64
    words: U64
    word_counts: I64
    through: I64

    @classmethod
    def none(cls, user_id: pa.DataType) -> GoneUsers:
        none, no_words = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        return cls(pa.array([], user_id), none, no_words, no_words, none, none)

    def counts_of(self, user_ids: pa.Array, salt: int) -> I64:
        """[U] how many of each user's oldest events are gone."""
        counts = np.zeros(len(user_ids), np.int64)
        known, at = self._dropped(user_ids)
        counts[known] = self.counts[at]
        known, at = self._erased(user_ids, salt)
        counts[known] += self.word_counts[at]
        return counts

    def checksums_of(self, user_ids: pa.Array, salt: int) -> tuple[U64, Bools]:
        """[U] the sum of the words of each user's events that are gone, and whether it is known:
        it is not where some of them were erased."""
        sums = np.zeros(len(user_ids), np.uint64)
        known, at = self._dropped(user_ids)
        sums[known] = self.checksums[at]
        erased, at = self._erased(user_ids, salt)
        certain = np.ones(len(user_ids), bool)
        certain[erased] = self.word_counts[at] == 0
        return sums, certain

    def erased_through(self, user_ids: pa.Array, salt: int) -> I64:
        """[U] the index of the last window that a user's erasure covers; -1 if not erased."""
        found = np.full(len(user_ids), -1, np.int64)
        known, at = self._erased(user_ids, salt)
        found[known] = self.through[at]
        return found

    def _dropped(self, user_ids: pa.Array) -> tuple[Bools, I64]:
        """[U] who has dropped events, and where each of them stands."""
        at = pc.index_in(user_ids, value_set=self.user_ids)
        return np.asarray(at.is_valid()), np.asarray(at.drop_null(), np.int64)

    def _erased(self, user_ids: pa.Array, salt: int) -> tuple[Bools, I64]:
        if not len(self.words) or not len(user_ids):
            return np.zeros(len(user_ids), bool), np.zeros(0, np.int64)
        words = user_words(user_ids, salt)
        at = np.minimum(np.searchsorted(self.words, words), len(self.words) - 1)
        known = self.words[at] == words
        return known, at[known]

    def dropping(self, user_ids: pa.Array, counts: I64, checksums: U64) -> GoneUsers:
        """With more events of some users (distinct) dropped. An erased user who came back, and
        whose new events are dropped, stands among both."""
        ids = pa.concat_arrays([self.user_ids, user_ids]).unique().sort()
        total = np.zeros(len(ids), np.int64)
        sums = np.zeros(len(ids), np.uint64)
        for some, num, words in (
            (self.user_ids, self.counts, self.checksums),
            (user_ids, counts, checksums),
        ):
            at = np.asarray(pc.index_in(some, value_set=ids), np.int64)
            total[at] += num
            sums[at] += words
        return replace(self, user_ids=ids, counts=total, checksums=sums)

    def erasing(self, user_ids: pa.Array, counts: I64, salt: int, through: int) -> GoneUsers:
        """With events of some users erased; what was dropped of them is kept under their words."""
        known, at = self._dropped(user_ids)
        counts = counts.copy()
        counts[known] += self.counts[at]
        words = np.concatenate([self.words, user_words(user_ids, salt)])
        distinct, where = np.unique(words, return_inverse=True)
        total = np.zeros(len(distinct), np.int64)
        np.add.at(total, where, np.concatenate([self.word_counts, counts]))
        newest = np.full(len(distinct), -1, np.int64)
        last = np.concatenate([self.through, np.full(len(user_ids), through, np.int64)])
        np.maximum.at(newest, where, last)
        stay = pc.invert(pc.is_in(self.user_ids, value_set=user_ids))
        mask = np.asarray(stay)
        return GoneUsers(
            self.user_ids.filter(stay),
            self.counts[mask],
            self.checksums[mask],
            distinct,
            total,
            newest,
        )

    def write(self, storage: Storage) -> str:
        """Put it in place; returns the sidecar's path."""
        num_dropped, num_erased = len(self.user_ids), len(self.words)

        def both(dropped: pa.Array | I64 | U64, erased: pa.Array | I64 | U64) -> pa.Array:
            dropped, erased = pa.array(dropped), pa.array(erased)
            kind = dropped.type if pa.types.is_null(erased.type) else erased.type
            return pa.concat_arrays([dropped.cast(kind), erased.cast(kind)])

        batch = pa.record_batch(
            {
                "user_id": both(self.user_ids, pa.nulls(num_erased)),
                "word": both(pa.nulls(num_dropped), self.words),
                "count": both(self.counts, self.word_counts),
                "checksum": both(self.checksums, pa.nulls(num_erased)),
                "through": both(pa.nulls(num_dropped), self.through),
            }
        )
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        return put_sidecar(storage, _FOLDER, sink.getvalue().to_pybytes(), ".arrow")

    @classmethod
    def read(cls, storage: Storage, path: str) -> GoneUsers:
        """What `write` put in place."""
        table = pa.ipc.open_stream(read_sidecar(storage, path)).read_all()
        dropped = table.filter(pc.is_valid(table["user_id"]))
        erased = table.filter(pc.is_valid(table["word"]))
        return cls(
            _whole(dropped["user_id"]),
            np.asarray(_whole(dropped["count"])),
            np.asarray(_whole(dropped["checksum"])),
            np.asarray(_whole(erased["word"])),
            np.asarray(_whole(erased["count"])),
            np.asarray(_whole(erased["through"])),
        )


@dataclass(frozen=True)
class GoneRows:
    """What is gone of the rows of U users.

    Attributes:
        counts: [U] how many of each user's oldest rows.
        checksums: [U] the sum of their words, where `certain`.
        certain: [U] whether that sum is known.
        erased_through: [U] the index of the last window that the user's erasure covers, or -1.
    """

    counts: I64
    checksums: U64
    certain: Bools
    erased_through: I64

    @classmethod
    def none(cls, num_users: int) -> GoneRows:
        return cls(
            np.zeros(num_users, np.int64),
            np.zeros(num_users, np.uint64),
            np.ones(num_users, bool),
            np.full(num_users, -1, np.int64),
        )

    def fill(self, places: Bools, users: GoneUsers, user_ids: pa.Array, salt: int) -> None:
        """Set what is known of the users of one bucket, who stand at `places`."""
        self.counts[places] = users.counts_of(user_ids, salt)
        self.checksums[places], self.certain[places] = users.checksums_of(user_ids, salt)
        self.erased_through[places] = users.erased_through(user_ids, salt)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
