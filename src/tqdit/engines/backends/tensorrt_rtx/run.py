"""The backend `tensorrt-rtx`, running."""

from __future__ import annotations

from pathlib import Path

from tqdit.engines.backends.tensorrt.library import TENSORRT_RTX
from tqdit.engines.backends.tensorrt.run import TensorRTEngine, open_engine
from tqdit.engines.bundle import Manifest


def load(folder: Path, manifest: Manifest, file: str, threads: int | None) -> TensorRTEngine:
    return open_engine(TENSORRT_RTX, folder, manifest, file)
