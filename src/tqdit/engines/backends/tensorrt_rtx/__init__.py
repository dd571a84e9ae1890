"""The backend `tensorrt-rtx`; its code is that of `tensorrt`, with the library that builds without a GPU."""
