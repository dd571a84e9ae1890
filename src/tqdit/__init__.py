"""TQDiT: calibrate, export, build and sample quantized diffusion transformers.

`tqdit.api` describes the flow. Importing `tqdit` loads none of the stages' libraries: each name is imported at its
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tqdit.version import __version__

if TYPE_CHECKING:
    from tqdit.api import build as build
    from tqdit.api import calibrate as calibrate
    from tqdit.api import export as export
    from tqdit.api import load_model as load_model
    from tqdit.api import record as record
    from tqdit.engines.config import BuildConfig as BuildConfig
    from tqdit.engines.gpu import GpuShare as GpuShare
    from tqdit.engines.run.denoiser import Denoiser as Denoiser
    from tqdit.engines.run.drop_in import DropIn as DropIn
    from tqdit.engines.run.sampler import Sampler as Sampler
    from tqdit.engines.run.shards import read_shards as read_shards
    from tqdit.engines.run.step_batcher import StepBatcher as StepBatcher
    from tqdit.models.model_card import ModelCard as ModelCard
    from tqdit.quantization.table import ScaleTable as ScaleTable

_HOMES = {
    "BuildConfig": "tqdit.engines.config",
    "Denoiser": "tqdit.engines.run.denoiser",
    "DropIn": "tqdit.engines.run.drop_in",
    "GpuShare": "tqdit.engines.gpu",
    "ModelCard": "tqdit.models.model_card",
    "Sampler": "tqdit.engines.run.sampler",
    "ScaleTable": "tqdit.quantization.table",
    "StepBatcher": "tqdit.engines.run.step_batcher",
    "build": "tqdit.api",
    "calibrate": "tqdit.api",
    "export": "tqdit.api",
    "load_model": "tqdit.api",
    "read_shards": "tqdit.engines.run.shards",
    "record": "tqdit.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tqdit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = ["__version__", *_HOMES]
