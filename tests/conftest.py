"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Machines that run the tests are shared and noisy: no example is too slow, none is timed.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50
)
settings.register_profile(
    "thorough", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=1000
)
settings.load_profile(os.environ.get("VLM_HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the public data sets; docs/real-data.md says what lies in it."""
    folder = Path(os.environ.get("VLM_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "ml-100k" / "u.data.gz").exists():
        message = f"the real data sets are not in {folder} (see docs/real-data.md)"
        if os.environ.get("VLM_REQUIRE_REAL_DATA"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
