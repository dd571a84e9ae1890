"""Adapter for `demo`, the small class-conditional DiT of the distribution `tqdit-demo` (docs/demo-model.md)."""

from __future__ import annotations

from dataclasses import replace

from tqdit.demo.glyphs import CLASSES
from tqdit.demo.weights import shipped
from tqdit.models.families import published
from tqdit.models.loaded import LoadedModel, Source
from tqdit.models.model_card import ModelCard, Proposal

NAME = "demo"
CARD = ModelCard(
    space="pixels", heads=4, class_names=tuple(CLASSES),
    proposed=Proposal("dpm++2m-sde", 8),  # docs/runtime.md, "The defaults of the demo models"
)  # fmt: skip


def matches(source: Source) -> bool:
    return isinstance(source, str) and source == NAME


def load(source: Source, heads: int | None = None) -> LoadedModel:
    return replace(published.load(str(shipped("model.safetensors")), heads), origin=NAME, source=NAME)
