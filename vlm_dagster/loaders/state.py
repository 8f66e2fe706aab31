"""Where a loader stands, as JSON: what it reads, in which order, and how many batches are done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_dagster.errors import PinError
from vlm_dagster.loaders.options import OrderOptions

__all__ = ["LoaderFacts", "Position"]

STATE_VERSION = 2


def _shuffle_digest() -> str:
    """Of a shuffle: numpy does not promise that its generators give the same ones in every version."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([1, 2, 3])))
    return hashlib.sha256(rng.permutation(1000).astype("<i8").tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Position:
    """A place in a run.

    Attributes:
        epoch: under way, from 0.
        num_batches: of it that are done, by all ranks together.
    """

    epoch: int
    num_batches: int


@dataclass(frozen=True)
class LoaderFacts:
    """All that decides which batches come; neither ranks, nor workers, nor the form of batches do.

    Attributes:
        pointers: table id, windows and digest of the examples.
        histories: per group, table id and digest.
        projections: per group.
        num_examples: less than were sealed where users were erased, or events dropped, since.
        options: of the order.
    """

    pointers: Mapping[str, Any]
    histories: Mapping[str, Mapping[str, Any]]
    projections: Mapping[str, Mapping[str, Any]]
    num_examples: int
    options: OrderOptions

    def state(self, position: Position) -> dict[str, Any]:
        """The state of a loader of these facts at a position."""
        return {
            "version": STATE_VERSION,
            "epoch": position.epoch,
            "num_batches": position.num_batches,
            "num_examples": self.num_examples,
            "pointers": dict(self.pointers),
            "histories": {group: dict(pin) for group, pin in self.histories.items()},
            "projections": {group: dict(value) for group, value in self.projections.items()},
            "options": self.options.to_json(),
            "shuffle": _shuffle_digest(),
        }

    def position(self, state: Mapping[str, Any]) -> Position:
        """The position in a state, once all facts are found equal.

        Raises:
            PinError: the state was made on other data, with other options, or by another release.
        """
        if not isinstance(state, Mapping):
            raise self.damaged(f"a {type(state).__name__}")
        if state.get("version") != STATE_VERSION:
            raise PinError(
                "loader state",
                pinned=f"version {state.get('version')}",
                found=f"version {STATE_VERSION}",
                way_out="It was made by another release: use that one, or start the epoch anew.",
            )
        try:
            differences = self._differences(state)
            position = Position(_count(state, "epoch"), _count(state, "num_batches"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.damaged(f"no readable value ({error!r})") from None
        if differences:
            what, pinned, found = differences[0]
            more = f" ({len(differences) - 1} more differences)" if len(differences) > 1 else ""
            raise PinError(
                f"loader state, {what}",
                pinned=pinned,
                found=found,
                way_out=f"Other batches would come{more}: make the loader as it was, or start anew.",
            )
        return position

    def damaged(self, what: str) -> PinError:
        """The error for a state that no loader made."""
        return PinError(
            "loader state",
            pinned=what,
            found=f"a loader of {self.num_examples:,} examples",
            way_out="It is damaged: take another one, or start the epoch anew.",
        )

    def _differences(self, state: Mapping[str, Any]) -> Sequence[tuple[str, object, object]]:
        there, here = state["pointers"], self.pointers
        found: list[tuple[str, object, object]] = [
            (f"{key} of the pointers", there[key], here[key])
            for key in ("table_id", "windows", "digest")
            if there[key] != here[key]
        ]
        for name, mine in (("histories", self.histories), ("projections", self.projections)):
            for group in sorted({*state[name], *mine}):
                theirs, ours = state[name].get(group), mine.get(group)
                if theirs != ours:
                    singular = {"histories": "history", "projections": "projection"}[name]
                    found.append((f"{singular} {group!r}", theirs, ours))
        if state["num_examples"] != self.num_examples:
            found.append(("number of examples", state["num_examples"], self.num_examples))
        shuffle = _shuffle_digest()
        if state["shuffle"] != shuffle:
            found.append((f"shuffles of numpy {np.__version__}", state["shuffle"], shuffle))
        options = dict(state["options"])
        found += [
            (name, options.get(name), mine)
            for name, mine in self.options.to_json().items()
            if options.get(name) != mine
        ]
        return found


def _count(state: Mapping[str, Any], name: str) -> int:
    value = state[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r}")
    return value
