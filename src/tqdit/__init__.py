"""TQDiT: calibrate, export, build and sample quantized diffusion transformers.

The stages are packages of their own (`tqdit.export`, `tqdit.engines`, ...) and are imported when they are needed:
importing `tqdit` loads none of their libraries.
"""

__version__ = "0.1.0"
