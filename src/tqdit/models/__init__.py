"""Diffusion transformers and the adapters that load them.

A new kind of model is a new adapter: a module with `matches(source)` and `load(source, heads)` that returns a
`LoadedModel`, added to `ADAPTERS`. Nothing else changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tqdit.errors import CheckpointError
from tqdit.models import demo, diffusers, published
from tqdit.models.loaded import LoadedModel


class Adapter(Protocol):
    def matches(self, source: str) -> bool: ...

    def load(self, source: str, heads: int | None = None) -> LoadedModel: ...


ADAPTERS: tuple[Adapter, ...] = (demo, diffusers, published)


def load_model(source: str, heads: int | None = None) -> LoadedModel:
    """Load `demo`, a published DiT checkpoint (`.pt`, `.safetensors`) or a diffusers directory.

    Raises CheckpointError with one line that names the file and what is wrong with it.
    """
    for adapter in ADAPTERS:
        if adapter.matches(source):
            return adapter.load(source, heads)
    if not Path(source).exists():
        raise CheckpointError(
            f"{source}: no such file or directory. Pass 'demo', a DiT checkpoint (.pt, .safetensors) or a diffusers "
            "directory."
        )
    raise CheckpointError(
        f"{source}: a model is expected here, '{Path(source).suffix or 'no suffix'}' is none. Pass 'demo', a DiT "
        "checkpoint (.pt, .safetensors) or a diffusers directory."
    )


__all__ = ["ADAPTERS", "Adapter", "LoadedModel", "load_model"]
