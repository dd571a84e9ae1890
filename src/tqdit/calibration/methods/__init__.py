"""Methods: each finds the parameters of one product's quantizers. A new method is a new file and a row here."""

from __future__ import annotations

from collections.abc import Callable

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.methods import gptq, min_max, search, weights
from tqdit.calibration.problem import Problem, Solution

Method = Callable[[Problem, QuantizationConfig], Solution]

METHODS: dict[str, Method] = {
    "search": search.solve,
    "min-max": min_max.solve,
    "gptq": gptq.solve,
    "reconstruct": search.solve,  # phase 4 begins with it
    "weights": weights.solve,
}

__all__ = ["METHODS", "Method"]
