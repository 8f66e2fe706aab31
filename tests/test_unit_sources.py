"""Units read here, or from a spec that was opened somewhere else."""

from __future__ import annotations

import itertools
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from unit_sources import COLUMNS, World, assert_same, opened, world_in

from vlm_dagster import Projection
from vlm_dagster.errors import TableError
from vlm_dagster.loaders import materialize as reading
from vlm_dagster.loaders.materialize import materialize
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.sources import ReadSpec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_in(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("verify", [True, False])
def test_a_direct_source_gives_what_materialize_gives(world: World, verify: bool) -> None:
    source = world.direct()
    assert len(world.plan.units) > 10
    for unit in world.plan.units:
        users = world.plan.users_of(unit)
        wanted = materialize(
            world.pointers, world.histories, world.projections, unit.bucket, users,
            columns=COLUMNS, verify=verify,
        )  # fmt: skip
        found = source.read(unit, users, verify=verify)
        assert found.num_examples == unit.num_examples
        assert_same(found, wanted)
    source.close()
    source.close()


def test_a_spec_survives_pickling_and_opens_to_the_same_units(world: World) -> None:
    spec: ReadSpec = pickle.loads(pickle.dumps(world.spec))
    assert spec == world.spec
    source, direct = spec.open(), world.direct()
    for unit in world.plan.units[:3]:
        users = world.plan.users_of(unit)
        assert_same(source.read(unit, users, verify=True), direct.read(unit, users, verify=True))


def test_a_unit_of_nobody_is_empty(world: World) -> None:
    found = world.direct().read(Unit(None, 0, 0, 0, 0, 0), pa.array([], pa.int64()), verify=True)
    assert found.num_examples == 0
    assert len(found.arenas["ratings"].columns["title"]) == 0


def test_a_spec_shows_no_credentials(world: World) -> None:
    spec = replace(world.spec, storage_options={"aws_secret_access_key": "hush"})
    assert "hush" not in repr(spec)
    assert "hush" not in str(spec)
    assert pickle.loads(pickle.dumps(spec)).storage_options == spec.storage_options


def test_a_spec_names_where_a_moved_table_lies_now(world: World, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(world.histories["ratings"].uri, moved)
    pin = world.histories["ratings"].ref()
    histories = {**world.histories, "ratings": pin.open(uri=str(moved))}
    spec = ReadSpec.of(world.pointers, histories, world.projections, COLUMNS)
    assert spec.histories["ratings"].uri == str(moved)
    assert replace(spec.histories["ratings"], uri=pin.uri) == pin
    unit = world.plan.units[0]
    users = world.plan.users_of(unit)
    assert_same(
        spec.open().read(unit, users, verify=True), world.direct().read(unit, users, verify=True)
    )
    shutil.rmtree(moved)
    with pytest.raises(TableError, match="elsewhere"):
        spec.open()


def test_one_group_of_several_can_be_read_alone(world: World) -> None:
    folder = Path(world.pointers.uri).parent
    alone = opened(folder, {"views": Projection([], max_length=3)})
    unit = alone.plan.units[0]
    found = alone.spec.open().read(unit, alone.plan.users_of(unit), verify=True)
    assert list(found.arenas) == ["views"]
    assert found.arenas["views"].columns == {}
    assert len(found.arenas["views"].lengths) == unit.num_examples


def test_pointers_that_do_not_match_are_counted_in_all_groups(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    matches_of, numbers = reading._matches, itertools.count(2)

    def wrong(*given: object) -> np.ndarray:
        found = matches_of(*given)  # type: ignore[arg-type]
        found[: next(numbers)] = False  # two of the first group, three of the second
        return found

    monkeypatch.setattr(reading, "_matches", wrong)
    unit = world.plan.units[0]
    users = world.plan.users_of(unit)
    found = world.direct().read(unit, users, verify=True)
    assert found.kept is not None
    assert found.kept.tolist() == [row >= 3 for row in range(unit.num_examples)]
    assert found.bad is not None
    assert found.bad.group == "ratings"
    assert "5 such pointers" in str(found.bad)
