"""Branches of low rank (SVDQuant, arXiv 2411.05007): what a weight's few strongest directions take, nothing rounds.

W = up down + R, and R is what is quantized. The branch is found by turns with the rounding of R: what rounding did to R
is given to the branch to mend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tqdit.calibration.config import QuantizationConfig
from tqdit.models.columns import part_widths
from tqdit.models.loaded import LoadedModel
from tqdit.models.rewrites import Rewrites, Rewritten, Tensors
from tqdit.quantization.fold import fold_layers
from tqdit.quantization.rounding import range_scale, rounded

ROUNDS = 10  # docs/methods.md
POWERS = 4  # of W W^T, between two orthonormalisations of the subspace
SPARE = 8  # directions beside those that are kept, which make the kept ones exact sooner


def find_branches(
    model: LoadedModel, rewrites: Rewrites, divisors: Mapping[str, Tensors], config: QuantizationConfig
) -> Iterator[tuple[str, dict[str, Tensor], int]]:
    """(layer, its tensors up and down, multiply-adds that they took) of each layer that gets a branch.

    divisors: layer -> its divisor, which is in the weight whose branch is found, as is the rotation.
    """
    if not rewrites.rank:
        return
    model = fold_layers(model, replace(rewrites, columns=0, layer_columns={}), divisors, complete=False)
    for name, layer in model.network.named_modules():
        if isinstance(layer, Rewritten) and layer.down is not None:
            weight, rank = model.weights.read(layer.core.weight), layer.down.out_features
            columns = rewrites.layer_columns.get(f"{name}.core", rewrites.columns)
            bits = config.for_layer(f"{name}.core").weight_bits
            up, down = find_branch(weight, rank, bits, part_widths(weight.shape[1], columns))
            yield name, {"up": up, "down": down}, multiply_adds(weight.numel(), rank)


@torch.no_grad()
def find_branch(weight: Tensor, rank: int, bits: int, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """up (O, rank) and down (rank, K), float16, of a weight (O, K) whose rest is rounded to `bits`.

    widths: input channels of each product that the rest is multiplied in; each has a scale per output channel. Of all
    rounds the branch that leaves the smallest sum of (W^ - W)^2 is returned; the weight is in units where that counts.
    float16 holds the factors exactly in engines of half precision.
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    basis = torch.randn(len(weight), min(rank + SPARE, *weight.shape), generator=generator, device=weight.device)
    best, found, target = float("inf"), None, weight
    for _ in range(ROUNDS):
        basis, up, down = _strongest(target, basis, rank)
        rest = weight - up.float() @ down.float()
        nearest = torch.cat([_nearest(part, bits) for part in torch.split(rest, list(widths), 1)], 1)
        error = float((rest - nearest).square().sum(dtype=torch.float64))
        if error < best:
            best, found = error, (up, down)
        target = weight - nearest
    assert found is not None
    up, down = found  # in the order that a file holds them in: a product's last bits depend on it
    return up.contiguous(), down.contiguous()


def multiply_adds(elements: int, rank: int) -> int:
    """That `find_branch` takes for a weight of so many elements."""
    return ROUNDS * elements * (2 * POWERS + 3) * (rank + SPARE)


def _strongest(weight: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The next basis, and the best approximation of this rank, by subspace iteration."""
    for _ in range(POWERS):
        basis = torch.linalg.qr(weight @ (weight.t() @ basis))[0]
    left, values, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    root = values[:rank].sqrt()
    up = (basis @ left[:, :rank]) * root
    return basis, up.half(), (root[:, None] * right[:rank]).half()


def _nearest(weight: Tensor, bits: int) -> Tensor:
    """Rounded to nearest, with a range-based scale per output channel."""
    return rounded(weight, range_scale(weight.abs().amax(1, keepdim=True), bits), bits)
