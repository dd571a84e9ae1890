"""ONNX Runtime, the default backend. Its artefact is an ONNX file whose graph was optimised once, at build time."""
