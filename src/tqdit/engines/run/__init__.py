"""What runs an engine. Imports neither the build side nor torch nor onnx (`drop_in` imports torch)."""
