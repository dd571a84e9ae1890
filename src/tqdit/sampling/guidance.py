"""Guidance: what a chain makes of the predictions of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.bounds import MOST_GUIDANCE, check_number
from tqdit.errors import UsageError

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): u + scale (c - u) of a conditional and an unconditional row.

    The rows of a call are all conditional ones, then all unconditional ones.
    """

    scale: float  # if a user names none
    channels: int | None = None  # how many leading channels of the prediction it moves; None: all

    def __post_init__(self) -> None:
        check_number("guidance scale", self.scale, -MOST_GUIDANCE, MOST_GUIDANCE)
        if self.channels is not None and self.channels < 1:
            raise UsageError(f"guidance of {self.channels} channels; expected at least one.")

    def combine(self, output: Float32, scale: Float32, out: Float32, only: NDArray[np.int64] | None = None) -> None:
        """Write the guided prediction of B images into `out` (B, C, ...).

        output (2 B, K, ...), K >= C, scale (B,). Other channels are those of the conditional row. only (U,): the
        images that have an unconditional row, if not all of them: output (B + U, K, ...).
        """
        images = len(out)
        if only is not None:
            np.copyto(out, output[:images, : out.shape[1]])
            part, pairs = np.empty_like(out[: len(only)]), np.concatenate([output[only], output[images:]])
            self.combine(pairs, scale[only], part)
            out[only] = part
            return
        moved = out.shape[1] if self.channels is None else min(self.channels, out.shape[1])
        conditional, unconditional = output[:images], output[images:]
        guided = out[:, :moved]
        np.subtract(conditional[:, :moved], unconditional[:, :moved], out=guided)
        guided *= column(scale, out.ndim)
        guided += unconditional[:, :moved]
        out[:, moved:] = conditional[:, moved : out.shape[1]]

    def weights(self, scale: float, channels: int) -> NDArray[np.float64]:
        """The factors with which errors of the conditional and the unconditional row enter the guided prediction,
        (2, C) for its C channels."""
        moved = np.arange(channels) < (channels if self.channels is None else self.channels)
        return np.abs(np.where(moved, [[scale], [1 - scale]], [[1.0], [0.0]]))


def rows_per_image(guidance: Guidance | None) -> int:
    """How many rows of a network call one image needs."""
    return 1 if guidance is None else 2


def check_scale(guidance: Guidance | None, scale: float | None) -> float:
    """The guidance scale to use; None means the default. Raises UsageError if it has no meaning."""
    if guidance is None:
        if scale is not None:
            raise UsageError(
                "this model is sampled without guidance and takes no guidance scale. Leave it out. (A scale that the "
                "network itself takes is one of its request values.)"
            )
        return 1.0
    return check_number("guidance scale", guidance.scale if scale is None else scale, -MOST_GUIDANCE, MOST_GUIDANCE)


def column(values: NDArray[Any], ndim: int) -> NDArray[Any]:
    """(B,) to (B, 1, ...) with `ndim` dimensions."""
    return values.reshape(-1, *[1] * (ndim - 1))
