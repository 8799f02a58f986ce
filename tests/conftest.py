"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def golden_folder() -> Path:
    """Inputs and outputs of the authors' released code; they lie beside the checkout, not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden files (../shared/golden) are not there")
    return folder
