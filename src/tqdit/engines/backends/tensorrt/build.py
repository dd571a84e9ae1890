"""The backend `tensorrt`: plans for the GPU of this machine, by TensorRT 10.3 and later or 11.x."""

from __future__ import annotations

from functools import partial

from tqdit.engines.backends.tensorrt import builder
from tqdit.engines.backends.tensorrt.library import TENSORRT

OPTIONS = TENSORRT.options
CASTS_FLOATS = False
TAKES_FP8 = True

fitness = partial(builder.fitness, TENSORRT, 40)
float_types = partial(builder.float_types, TENSORRT)
place = partial(builder.place, TENSORRT)
build = partial(builder.build, TENSORRT)
