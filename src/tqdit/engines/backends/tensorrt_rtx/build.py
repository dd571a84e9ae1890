"""The backend `tensorrt-rtx`: portable engines for RTX GPUs, built on any x86-64 machine."""

from __future__ import annotations

from functools import partial

from tqdit.engines.backends.tensorrt import builder
from tqdit.engines.backends.tensorrt.library import TENSORRT_RTX

OPTIONS = TENSORRT_RTX.options
CASTS_FLOATS = False
TAKES_FP8 = True

fitness = partial(builder.fitness, TENSORRT_RTX, 30)
float_types = partial(builder.float_types, TENSORRT_RTX)
place = partial(builder.place, TENSORRT_RTX)
build = partial(builder.build, TENSORRT_RTX)
