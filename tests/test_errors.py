"""Every error says what, where, which value and the way out, and survives pickling."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle

import pytest

from vlm_dagster import errors

ROW = {"row": 7, "column": "event_time", "value": None, "way_out": "Drop the row.", "num_rows": 3}

ONE_OF_EACH = [
    errors.SchemaError("trait 'x' is odd", "Declare it otherwise."),
    errors.InvalidEventsError("is null", **ROW, where="a.parquet"),
    errors.InvalidRequestsError("is null", **ROW),
    errors.SourceFormatError("u.data", "is cut off", line=3, value="1\t2", way_out="Repair it."),
    errors.WindowError("1997-9-20", "not a daily key", "Spell it otherwise."),
    errors.WindowSealedError(table="/t", window="1997-09-20", sealed="vlm1-a", offered="vlm1-b"),
    errors.WatermarkError(
        table="/t",
        version=3,
        watermark="1997-09-20T00:00:00Z",
        asked="a request",
        missing="abcdefg",
    ),
    errors.TableError("/t", "there is no Delta table here", "Check the address."),
    errors.PinError("history /t", pinned="a", found="b", way_out="Restore it."),
    errors.DroppedError("history /t", pinned="a", found="b", way_out="Train on later examples."),
    errors.CorruptFileError(
        table="/t", path="segment=a/b.parquet", version=3, problem="is missing"
    ),
    errors.RetiredVersionError(table="/t", version=3, by="gc", at="2025-01-01T00:00:00Z"),
    errors.ChecksumError(group="ratings", user_id="ü", end_position=5, num_bad=2),
    errors.StorageError("/t", "writing x", OSError(errno.ENOSPC, "No space left on device")),
    errors.GoneError(group="ratings", user_id=7, end_position=5, num_gone=2),
    errors.CheckpointError("/c", "is damaged", "Take another."),
    errors.TrainingError("the loss is not finite", "Lower the rate.", step=4),
    errors.LoaderError("it was forked", "Use spawn."),
    errors.WorkerError("process 7 was killed", "Use fewer.", exit_code=-9),
]


def declared_errors() -> set[type]:
    return {
        item
        for _, item in inspect.getmembers(errors, inspect.isclass)
        if issubclass(item, errors.VlmError) and not item.__name__.startswith("_")
    }


def test_there_is_one_of_each_here() -> None:
    assert {type(error) for error in ONE_OF_EACH} == declared_errors() - {errors.VlmError}


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda e: type(e).__name__)
def test_it_survives_pickling_and_copying(error: errors.VlmError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda e: type(e).__name__)
def test_it_is_one_sentence_after_another(error: errors.VlmError) -> None:
    text = str(error)
    assert text.endswith((".", "`."))
    assert ".." not in text.replace("...", "")
    assert "  " not in text
    assert ". ." not in text


def test_errors_of_bad_values_are_value_errors_and_of_storage_os_errors() -> None:
    for kind in (
        errors.SchemaError,
        errors.InvalidEventsError,
        errors.InvalidRequestsError,
        errors.SourceFormatError,
        errors.WindowError,
        errors.WatermarkError,
    ):
        assert issubclass(kind, ValueError)
    assert issubclass(errors.StorageError, OSError)


def test_a_bad_row_is_named_with_its_value_and_the_number_of_others() -> None:
    text = str(errors.InvalidEventsError("is null", **ROW, where="a.parquet"))
    for words in ("row 7 in a.parquet", "'event_time'", "None", "3 such rows", "Drop the row.",
                  "Nothing was written."):  # fmt: skip
        assert words in text


def test_a_sealed_window_names_both_digests_and_the_way_out() -> None:
    text = str(errors.WindowSealedError(table="/t", window="w", sealed="vlm1-a", offered="vlm1-b"))
    for words in (
        "vlm1-a",
        "vlm1-b",
        "vlm-dagster inspect /t --window w",
        "vlm-dagster correct /t w",
    ):
        assert words in text


def test_a_watermark_error_lists_a_few_of_the_missing_windows() -> None:
    text = str(
        errors.WatermarkError(table="/t", version=3, watermark="W", asked="A", missing="abcdefg")
    )
    assert "a, b, c, d, e, ..." in text
    assert "f," not in text


def test_a_storage_error_keeps_the_systems_own_words() -> None:
    text = str(errors.StorageError("/t", "writing x", OSError(errno.ENOSPC, "No space left")))
    assert "No space left" in text
    assert "Nothing was committed" in text


def test_the_names_are_sorted_and_complete() -> None:
    assert sorted(errors.__all__) == errors.__all__
    assert {kind.__name__ for kind in declared_errors()} == set(errors.__all__)
