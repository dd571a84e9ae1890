"""The toy family as a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tqdit.models import families
from tqdit.models.load import load_model
from tqdit.models.loaded import LoadedModel


@pytest.fixture
def two_streams(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """Two token streams, word tokens, a float timestep, rectified flow; no classes and no guidance."""
    toys = Path(__file__).parent.parent / "toys" / "families"
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(toys)])
    return load_model("two-streams")
