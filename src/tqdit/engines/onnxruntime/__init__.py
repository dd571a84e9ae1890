"""ONNX Runtime: the default backend. Its artefact is an ONNX file whose graph has been optimised once, at build time."""
