"""Which tensors are quantized, and how many scales one of them has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import FileFormatError

Role = Literal["weight", "input", "left", "right"]
ROLES: tuple[Role, ...] = ("weight", "input", "left", "right")


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: shape ()."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index along `axis` of the tensor: shape (C,), C = tensor.shape[axis]."""

    axis: int = 0


@dataclass(frozen=True)
class PerTimestepGroup:
    """One scale per group of timesteps: shape (n,). A row takes that of its own timestep's group."""

    n: int


@dataclass(frozen=True)
class PerToken:
    """One scale per token, found over the last axis while the network runs: shape (..., 1), of which none is stored."""


Granularity = PerTensor | PerChannel | PerTimestepGroup | PerToken


def granularity_to_text(granularity: Granularity) -> str:
    match granularity:
        case PerTensor():
            return "tensor"
        case PerChannel(axis):
            return f"channel:{axis}"
        case PerTimestepGroup(n):
            return f"group:{n}"
        case PerToken():
            return "token"


def granularity_from_text(text: str) -> Granularity:
    """The opposite of `granularity_to_text`. Raises FileFormatError if the text is unknown."""
    kind, _, number = text.partition(":")
    if kind == "tensor" and not number:
        return PerTensor()
    if kind == "token" and not number:
        return PerToken()
    if kind in ("channel", "group") and number.isdecimal() and len(number) < 10:
        return PerChannel(int(number)) if kind == "channel" else PerTimestepGroup(int(number))
    raise FileFormatError(
        f"granularity '{text}' is unknown; known are tensor, channel:AXIS, group:N, token. Calibrate again."
    )


def group_of(boundaries: NDArray[np.float64], timesteps: NDArray[Any]) -> NDArray[np.int64]:
    """The group 0..G-1 of each timestep: the number of boundaries at or below it."""
    return np.searchsorted(boundaries, timesteps, side="right").astype(np.int64)
