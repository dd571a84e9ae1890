"""What builds an engine from an ONNX file."""
