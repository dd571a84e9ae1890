"""The backend `tensorrt-rtx`: portable engines for RTX GPUs, built on any x86-64 machine."""

from __future__ import annotations

from pathlib import Path

from tqdit.card import GraphCard
from tqdit.engines.backends.tensorrt import builder
from tqdit.engines.backends.tensorrt.library import TENSORRT_RTX
from tqdit.engines.build.backend import Fitness
from tqdit.engines.bundle import Manifest
from tqdit.engines.config import BuildConfig, FloatType, Progress, silent
from tqdit.onnx_file import OnnxFile

OPTIONS = TENSORRT_RTX.options
CASTS_FLOATS = False


def fitness() -> Fitness:
    return builder.fitness(TENSORRT_RTX, 30)


def float_types(config: BuildConfig) -> tuple[FloatType, ...]:
    return builder.float_types(TENSORRT_RTX, config)


def build(
    source: OnnxFile, card: GraphCard, folder: Path, config: BuildConfig, progress: Progress = silent
) -> Manifest:
    return builder.build(TENSORRT_RTX, source, card, folder, config, progress)
