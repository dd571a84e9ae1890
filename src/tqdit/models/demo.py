"""Adapter for `demo`, the small class-conditional DiT that ships with the package (docs/demo-model.md)."""

from __future__ import annotations

from importlib import resources

from tqdit.models import published
from tqdit.models.loaded import LoadedModel

NAME = "demo"


def matches(source: str) -> bool:
    return source == NAME


def load(source: str, heads: int | None = None) -> LoadedModel:
    path = resources.files("tqdit.demo") / "model.safetensors"
    return published.load(str(path), heads).with_source(NAME)
