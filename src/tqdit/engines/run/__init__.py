"""What runs an engine. Imports neither the build side nor torch nor onnx (`diffusers_transformer` imports torch)."""
