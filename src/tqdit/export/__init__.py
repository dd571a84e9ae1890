"""Stage 2: a model as one self-describing ONNX file (docs/onnx-file.md).

A float trace of the torch module (`trace`), wrapped into a sampling step (`step`), written whole with its card
(`write`).
"""

from tqdit.export.graph import ExportConfig, export_graph
from tqdit.export.write import write
from tqdit.onnx_file import read_card

__all__ = ["ExportConfig", "export_graph", "read_card", "write"]
