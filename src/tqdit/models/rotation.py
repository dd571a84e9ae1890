"""Rotations of input channels in blocks: y = (W H)(H x) with an orthogonal, symmetric H that spreads large channels.

H is block-diagonal with a regular Hadamard matrix in each block: all entries +-1 / sqrt(B), all rows with the sum 1. A
row of ones, which Sylvester's matrices have, would gather the mean of a block in one channel (ConvRot).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tqdit.bounds import BLOCKS


def hadamard(size: int) -> Tensor:
    """The matrix of one block, float32 (size, size), size in `BLOCKS`: orthogonal, symmetric, all rows of sum 1.

    Its entries are powers of two, so the float64 sums of a rotated weight are exact in practice on every machine.
    """
    four = torch.ones(4, 4).sub_(2 * torch.eye(4).flip(1)) / 2
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(found, four)
    return found


def block_of(width: int, most: int) -> int:
    """The largest of `BLOCKS` up to `most` that divides `width`; 0 if there is none."""
    return max((block for block in BLOCKS if block <= most and width % block == 0), default=0)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """The last axis of x (..., K) in blocks times the matrix (B, B) of one block."""
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)
