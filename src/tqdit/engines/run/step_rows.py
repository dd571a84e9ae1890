"""The rows of a step graph: their state, their noise and their inputs, in buffers that are allocated once.

`Sampler` and `StepBatcher` both feed engines from here, so that an image cannot depend on which of them made it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.errors import BackendError, SamplingError, UsageError
from tqdit.sampling import noise


class StepRows:
    """Up to `capacity` rows, each at a step of its own. Not thread-safe: one thread owns it.

    The rows in use are 0..count-1. `remove` moves the last row into the gap; what an engine computes for a row does
    not depend on its place.
    """

    def __init__(self, card: GraphCard, capacity: int) -> None:
        self.count = 0
        self._first_step = card.sampling.steps - 1
        self._adds_noise = card.sampling.sampler == "ddpm"
        self._normals = noise.Normals(card.image_shape)
        self._keys = [(0, 0)] * capacity  # seed, image: beyond int64
        shape = (capacity, *card.image_shape)
        self._x = np.zeros(shape, np.float32)  # (rows, C, H, W)
        self._noise = np.zeros(shape, np.float32)
        self._step = np.zeros(capacity, np.int64)
        self._labels = np.zeros(capacity, np.int64)
        self._scale = np.zeros(capacity, np.float32)
        self._finite_values = np.zeros((capacity, math.prod(card.image_shape)), np.bool_)
        self._finite = np.zeros(capacity, np.bool_)
        self._inputs: dict[str, NDArray[Any]] = {
            "x": self._x,
            "step": self._step,
            "class_labels": self._labels,
            "noise": self._noise,
        }
        if card.guided:
            self._inputs["guidance_scale"] = self._scale
        self._views: dict[str, NDArray[Any]] = {}

    @property
    def x(self) -> NDArray[np.float32]:
        """The states (count, C, H, W) in place: copy what shall outlive the next step."""
        return self._x[: self.count]

    def step_of(self, row: int) -> int:
        """The step that this row computes next; -1 after its last one."""
        return int(self._step[row])

    def add(self, label: int, scale: float, seed: int, image: int) -> int:
        """Begin a chain in a new row and return its number."""
        row = self.count
        self._keys[row] = seed, image
        self._normals.fill(self._x[row], seed, image, noise.INITIAL)
        self._step[row], self._labels[row], self._scale[row] = self._first_step, label, scale
        self._resize(row + 1)
        return row

    def remove(self, row: int) -> None:
        """Free a row; the last one takes its number."""
        last = self.count - 1
        if row != last:
            self._keys[row] = self._keys[last]
            for name in ("x", "step", "class_labels"):  # the noise is new in each step
                self._inputs[name][row] = self._inputs[name][last]
            self._scale[row] = self._scale[last]
        self._resize(last)

    def inputs(self) -> Mapping[str, NDArray[Any]]:
        """What the engine needs for the next step of every row: views (count, ...), the same ones until count changes.

        The noise of the last step is zero, which the graph ignores.
        """
        if self._adds_noise:
            for row in range(self.count):
                step = self._step[row]
                if step > 0:
                    self._normals.fill(self._noise[row], *self._keys[row], int(step))
                else:
                    self._noise[row] = 0
        return self._views

    def advance(self, x_next: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Take what the engine computed (count, C, H, W) and say which rows are finite: bool (count,), in place.

        Raises BackendError for an output of another shape.
        """
        if x_next.shape != self.x.shape:
            raise BackendError(f"the engine returned shape {x_next.shape} for {self.x.shape}. Build the engine again.")
        np.copyto(self.x, x_next)  # an engine may reuse its output buffer
        self._step[: self.count] -= 1
        values, finite = self._finite_values[: self.count], self._finite[: self.count]
        np.isfinite(self.x.reshape(self.count, -1), out=values)
        return np.all(values, axis=1, out=finite)

    def failure(self, row: int) -> SamplingError:
        """The error for a row that `advance` found not to be finite."""
        return SamplingError(
            f"image {self._keys[row][1]} (class {self._labels[row]}) became NaN or infinite at step "
            f"{self.step_of(row) + 1}. Lower the guidance scale, or export the model again from a good checkpoint."
        )

    def _resize(self, count: int) -> None:
        self.count = count
        self._views = {name: values[:count] for name, values in self._inputs.items()}


def check_labels(card: GraphCard, class_labels: Any) -> NDArray[np.int64]:
    """Labels as int64 (N,); raises UsageError for any that the model does not know."""
    labels = np.asarray(class_labels)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError("class_labels must be a non-empty list of integers.")
    highest = card.num_classes
    bad = labels[(labels < 0) | (labels > highest)]
    if len(bad):
        raise UsageError(
            f"class {bad[0]} is out of range; this model knows 0..{highest - 1} (and {highest}: no class)."
        )
    return labels.astype(np.int64)


def check_guidance(card: GraphCard, guidance_scale: float | None) -> float:
    """The scale to use; None means the engine's default."""
    scale = card.guidance_scale if guidance_scale is None else float(guidance_scale)
    if not math.isfinite(scale):
        raise UsageError(f"guidance scale {scale} is not a finite number.")
    if not card.guided and guidance_scale is not None:
        raise UsageError("this engine was exported with --unguided and takes no guidance scale.")
    return scale
