"""The backends: one folder each, with the modules `build` and `run`. A new backend is a new folder here.

A folder `tensorrt_rtx` is the backend `tensorrt-rtx`. What the modules must offer is written in `engines.build.backend`
and in `engines.run.backend`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Literal

from tqdit.errors import UsageError


def backend_names() -> tuple[str, ...]:
    """Names of all backends, installed or not, in alphabetical order."""
    return tuple(sorted(entry.name.replace("_", "-") for entry in pkgutil.iter_modules(__path__)))


def check_backend(backend: str) -> None:
    """Raises UsageError for an unknown name."""
    if backend not in backend_names():
        raise UsageError(f"unknown backend '{backend}'; this tqdit has {', '.join(backend_names())}.")


def load_side(backend: str, side: Literal["build", "run"]) -> object:
    """The module of one side of a backend. Raises UsageError for an unknown name."""
    check_backend(backend)
    return importlib.import_module(f"{__name__}.{backend.replace('-', '_')}.{side}")
