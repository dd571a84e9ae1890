"""Finding what a folder holds: a new sampler, scheme, family or backend is a new file, and no list names it."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def find_modules(package: ModuleType) -> dict[str, ModuleType]:
    """The modules in the folders of `package`, by file name in alphabetical order.

    Folders that are appended to `package.__path__` are searched, too.
    """
    names = sorted(entry.name for entry in pkgutil.iter_modules(package.__path__) if not entry.name.startswith("_"))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
