"""A backend in one folder, for the tests: it keeps the ONNX file, and ONNX Runtime interprets it as it stands."""
