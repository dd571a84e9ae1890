"""Diffusion transformers and the adapters that load them.

A new kind of model is a new adapter: a module in this folder with `matches(source)` and `load(source, heads)` that
returns a `LoadedModel`. Nothing else changes: adapters are found by these two functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Protocol, cast

from tqdit.errors import CheckpointError
from tqdit.models.loaded import LoadedModel
from tqdit.models.scratch import need_compiler


class Adapter(Protocol):
    def matches(self, source: str) -> bool: ...

    def load(self, source: str, heads: int | None = None) -> LoadedModel: ...


def find_adapters() -> tuple[Adapter, ...]:
    """The adapters in this folder, by name; the first that matches a source loads it."""
    modules = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
    return tuple(cast(Adapter, module) for module in modules if hasattr(module, "matches") and hasattr(module, "load"))


def load_model(source: str, heads: int | None = None) -> LoadedModel:
    """Load `demo`, a published DiT checkpoint (`.pt`, `.safetensors`) or a diffusers directory.

    Raises CheckpointError with one line that names the file and what is wrong with it, and OutputError where PyTorch
    finds no folder for temporary files.
    """
    for adapter in find_adapters():
        if adapter.matches(source):
            need_compiler()
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


__all__ = ["Adapter", "LoadedModel", "find_adapters", "load_model"]
