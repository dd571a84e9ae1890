"""Adapter for `demo`, the small class-conditional DiT that ships with the package (docs/demo-model.md)."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from tqdit.models.loaded import LoadedModel
from tqdit.models.origins import DEMO
from tqdit.models.published import build
from tqdit.models.state import read_metadata, read_tensors

NAME = "demo"


def matches(source: str) -> bool:
    return source == NAME


def load(source: str, heads: int | None = None) -> LoadedModel:
    path = Path(str(resources.files("tqdit.demo") / "model.safetensors"))
    facts = json.loads(read_metadata(path)["tqdit"])
    model = build(path, read_tensors(path), heads or facts["num_heads"], DEMO, tuple(facts["classes"]))
    return model.with_source(NAME)
