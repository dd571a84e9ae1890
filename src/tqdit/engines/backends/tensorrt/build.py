"""The backend `tensorrt`: plans for the GPU of this machine, by TensorRT 10.3 and later or 11.x."""

from __future__ import annotations

from pathlib import Path

from tqdit.card import GraphCard
from tqdit.engines.backends.tensorrt import builder
from tqdit.engines.backends.tensorrt.library import TENSORRT
from tqdit.engines.build.backend import Fitness
from tqdit.engines.bundle import Manifest
from tqdit.engines.config import BuildConfig, FloatType, Progress, silent
from tqdit.onnx_file import OnnxFile

OPTIONS = TENSORRT.options
CASTS_FLOATS = False


def fitness() -> Fitness:
    return builder.fitness(TENSORRT, 40)


def float_types(config: BuildConfig) -> tuple[FloatType, ...]:
    return builder.float_types(TENSORRT, config)


def build(
    source: OnnxFile, card: GraphCard, folder: Path, config: BuildConfig, progress: Progress = silent
) -> Manifest:
    return builder.build(TENSORRT, source, card, folder, config, progress)
