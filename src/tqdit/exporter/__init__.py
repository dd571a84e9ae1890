"""Stage 2: a model as one self-describing ONNX file (docs/onnx-file.md).

A float trace of the network call (`trace`), or of a whole sampling step around it (`step`); quantized by passes
(`passes/`) if there is a scale table; written whole with its card (`onnx_writer`).
"""
