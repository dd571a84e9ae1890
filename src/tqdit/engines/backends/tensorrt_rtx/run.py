"""The backend `tensorrt-rtx`, running."""

from functools import partial

from tqdit.engines.backends.tensorrt.library import TENSORRT_RTX
from tqdit.engines.backends.tensorrt.run import open_engine

TAKES_DEVICE = STREAMS_WEIGHTS = NEEDS_GPU = True
MODULES = (TENSORRT_RTX.module, "cuda.core")
load = partial(open_engine, TENSORRT_RTX)
