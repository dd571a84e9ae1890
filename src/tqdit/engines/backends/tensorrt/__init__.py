"""TensorRT and TensorRT-RTX: one builder, one audit and one runtime for both.

`library` holds every difference between the two and between TensorRT 10.x and 11.x; the rest of the package speaks of a
`Library` and never asks which one it is. `worker` is the only module that compiles, in a process of its own.
"""
