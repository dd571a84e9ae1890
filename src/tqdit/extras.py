"""Imports of optional libraries; the error for a missing one holds the pip command."""

from __future__ import annotations

import importlib
from types import ModuleType

from tqdit.errors import MissingLibraryError


def need(module: str, extra: str, why: str) -> ModuleType:
    """Import `module`, which the extra `extra` installs; `why` ends the sentence '... needs'."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingLibraryError(
            f"{why} needs {module.split('.')[0]}, which is not installed. Run: pip install 'tqdit[{extra}]'"
        ) from error
