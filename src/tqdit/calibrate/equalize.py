"""Channel equalisation: each input channel is divided by a constant that its weights are multiplied with.

A channel with a large range spends the step of all others; its weights are often small. Dividing moves range from the
activation, which has one step, to the weight, which has one per output channel, and changes nothing in float. The
division folds into what makes the input: adaLN for qkv and fc1, the rows of V for proj.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tqdit.calibrate.capture import Samples

STRENGTHS = (0.25, 0.5, 0.75)  # 0.5 gives input and weight the same range in each channel
LIMIT = 100.0  # of a divisor, against channels that the samples hardly excite


def divisors(samples: Samples, weight: Tensor) -> list[Tensor]:
    """Candidate divisors (K,): (max |x_j| / max |W_j|)^strength, with geometric mean 1."""
    assert samples.channels is not None
    low, high = samples.channels
    tiny = torch.finfo(torch.float32).tiny
    inputs = torch.maximum(low.abs(), high.abs()).amax(0).clamp(min=tiny)
    weights = weight.abs().amax(0).clamp(min=tiny)
    ratio = (inputs.log() - weights.log()) - (inputs.log() - weights.log()).mean()
    return [(strength * ratio).exp().clamp(1 / LIMIT, LIMIT) for strength in STRENGTHS]


def divide(samples: Samples, divisor: Tensor) -> Samples:
    """The samples of x / divisor."""
    assert samples.channels is not None
    low, high = (channel / divisor for channel in samples.channels)
    return replace(samples, left=samples.left / divisor, ranges={"left": (low.amin(1), high.amax(1))})
