"""Stage 2: a model as one self-describing ONNX file (docs/onnx-file.md).

A float trace of the torch module (`trace`), wrapped into a sampling step (`step`), quantized by passes (`passes/`)
where there is a scale table, written whole with its card (`onnx_writer`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdit.export.graph import ExportConfig, export_graph
    from tqdit.export.onnx_writer import write
    from tqdit.onnx_file import read_card

_HOMES = {
    "ExportConfig": "tqdit.export.graph",
    "export_graph": "tqdit.export.graph",
    "read_card": "tqdit.onnx_file",
    "write": "tqdit.export.onnx_writer",
}


def __getattr__(name: str) -> Any:
    """On first use, since the command line describes this stage on machines without torch and onnx too."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tqdit.export' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = ["ExportConfig", "export_graph", "read_card", "write"]
