"""Adapter for `demo`, the small class-conditional DiT of the distribution `tqdit-demo` (docs/demo-model.md)."""

from __future__ import annotations

from tqdit.demo.weights import shipped
from tqdit.models.families import published
from tqdit.models.loaded import LoadedModel

NAME = "demo"


def matches(source: str) -> bool:
    return source == NAME


def load(source: str, heads: int | None = None) -> LoadedModel:
    return published.load(str(shipped("model.safetensors")), heads).with_source(NAME)
