"""Stages 3 and 4: build an engine bundle (`build`) and sample with it (`run`), on one of the `backends`.

The run side imports neither the build side nor torch nor onnx.
"""
