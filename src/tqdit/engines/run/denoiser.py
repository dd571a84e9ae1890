"""A denoiser engine: the network alone, for schedulers of one's own. NumPy and one backend, no torch."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.diffusion import TRAINING_STEPS
from tqdit.engines.bundle import check_parts, read_manifest
from tqdit.engines.run.backend import Engine, runner
from tqdit.engines.run.step_rows import check_labels
from tqdit.errors import UsageError


class Denoiser:
    """(x, timestep, class_labels) -> noise_pred with the engine of a bundle. Thread-safe.

        with Denoiser.open("denoiser.engine") as denoise:
            noise_pred = denoise(x, timestep, class_labels)

    Guidance is the caller's: rows of the null class (label num_classes) beside the conditional ones.
    """

    def __init__(self, card: GraphCard, engine: Engine, batch: int | None = None) -> None:
        if card.graph != "denoiser":
            raise UsageError(
                "this engine holds a step graph, which has its sampler inside. Export again with --graph denoiser."
            )
        self.card = card
        self._batch = batch
        self._engine: Engine | None = engine

    @classmethod
    def open(cls, path: str | Path, *, threads: int | None = None) -> Denoiser:
        """Open a bundle of a graph that `tqdit-export --graph denoiser` wrote, after checking every file of it.

        threads: CPU threads per call; None leaves it to the backend. Raises FileFormatError for a damaged bundle,
        BackendError where it cannot run here, UsageError for a step graph.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest.card.graph != "denoiser":  # before the work of loading it
            raise UsageError(
                f"{folder}: holds a step graph, which has its sampler inside. Export again with --graph denoiser."
            )
        check_parts(folder, manifest)
        engine = runner(manifest.backend).load(folder, manifest, manifest.entry, threads)
        return cls(manifest.card, engine, None if manifest.batch is None else manifest.batch.most)

    def __call__(
        self, x: NDArray[np.float32], timestep: NDArray[np.integer[Any]], class_labels: NDArray[np.integer[Any]]
    ) -> NDArray[np.float32]:
        """x float (B, C, H, W), timestep int (B,) in 0..999, class_labels int (B,) in 0..num_classes.

        Returns float32 (B, K, H, W): the noise in the first C channels, then the learned variance, if there is one
        (K = 2C). More rows than the engine was built for take several calls. Raises UsageError for other shapes or
        values.
        """
        engine = self._engine
        if engine is None:
            raise UsageError("this denoiser is closed. Open the engine again.")
        if x.ndim != 4 or x.shape[1:] != self.card.image_shape or not len(x):
            expected = ", ".join(map(str, self.card.image_shape))
            raise UsageError(f"x has shape {x.shape}; this engine takes (B, {expected}).")
        labels = check_labels(self.card, class_labels)
        steps = np.asarray(timestep)
        if labels.shape != (len(x),) or steps.shape != (len(x),):
            raise UsageError(
                f"x has {len(x)} rows, timestep has shape {steps.shape} and class_labels {labels.shape}; expected one "
                "of each per row."
            )
        if not np.issubdtype(steps.dtype, np.integer) or steps.min() < 0 or steps.max() >= TRAINING_STEPS:
            raise UsageError(f"timestep is {steps}; expected integers in 0..{TRAINING_STEPS - 1}.")
        inputs: dict[str, NDArray[Any]] = {
            "x": np.ascontiguousarray(x, np.float32),
            "timestep": steps.astype(np.int64),
            "class_labels": labels,
        }
        most = self._batch or len(x)
        if len(x) <= most:
            return engine(inputs)
        parts = [slice(start, start + most) for start in range(0, len(x), most)]
        return np.concatenate([engine({name: value[part] for name, value in inputs.items()}) for part in parts])

    def close(self) -> None:
        """Free the engine; the denoiser cannot be used afterwards."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
