"""Engines behind HTTP (docs/guides/serve.md): `app.make_app` makes the ASGI application. No torch, no onnx."""
