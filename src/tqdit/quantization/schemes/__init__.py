"""Quantization schemes, one file each.

A new scheme is a new file here with a subclass of `tqdit.quantization.quantizer.Quantizer`. Nothing else changes: the
scale table, the search with its knob `inputs`, the fake-quantized network and the exporter find it by its name.
"""

from __future__ import annotations

import inspect
import sys

from tqdit.quantization.granularity import Role
from tqdit.quantization.quantizer import Quantizer
from tqdit.registry import find_modules


def find_schemes() -> dict[str, type[Quantizer]]:
    """name -> scheme, for every file in this folder."""
    modules = find_modules(sys.modules[__name__]).values()
    classes = [cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)
               if issubclass(cls, Quantizer) and cls.__module__ == module.__name__]  # fmt: skip
    return {cls.scheme: cls for cls in classes}


def schemes_of(role: Role) -> tuple[str, ...]:
    """Names of the schemes that can quantize tensors of this role."""
    return tuple(name for name, scheme in find_schemes().items() if role in scheme.roles)
