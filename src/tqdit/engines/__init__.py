"""Stages 3 and 4: build an engine bundle and sample with it. Imports neither torch nor onnx.

from tqdit.engines import Sampler

with Sampler.open("model.engine") as sampler:
    images = sampler.sample([0, 1, 2, 3], seed=7)  # uint8 (4, H, W, 3)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tqdit.engines.build import build_engine
from tqdit.engines.denoiser import Denoiser
from tqdit.engines.sampler import Sampler, StepReport
from tqdit.engines.step_batcher import BatcherStats, Progress, StepBatcher

if TYPE_CHECKING:
    from tqdit.engines.diffusers_transformer import DiffusersTransformer


def __getattr__(name: str) -> Any:
    """On first use, since it imports torch and diffusers."""
    if name != "DiffusersTransformer":
        raise AttributeError(f"module 'tqdit.engines' has no attribute '{name}'")
    return importlib.import_module("tqdit.engines.diffusers_transformer").DiffusersTransformer


__all__ = [
    "BatcherStats",
    "Denoiser",
    "DiffusersTransformer",
    "Progress",
    "Sampler",
    "StepBatcher",
    "StepReport",
    "build_engine",
]
