"""Stages 3 and 4: build an engine bundle and sample with it. Imports neither torch nor onnx.

from tqdit.engines import Sampler

with Sampler.open("model.engine") as sampler:
    images = sampler.sample([0, 1, 2, 3], seed=7)  # uint8 (4, H, W, 3)
"""

from tqdit.engines.build import build_engine
from tqdit.engines.sampler import Sampler, StepReport
from tqdit.engines.step_batcher import BatcherStats, Progress, StepBatcher

__all__ = ["BatcherStats", "Progress", "Sampler", "StepBatcher", "StepReport", "build_engine"]
