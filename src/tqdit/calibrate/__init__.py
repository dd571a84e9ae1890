"""Calibration: a float diffusion transformer in, a scale table out (docs/calibration.md).

`calibrate(model, config, work)` finds scales, `apply(model, table)` gives the fake-quantized model that a table means;
exports must compute the same. `QuantizationConfig` holds every knob, `PRESETS` the named sets of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdit.calibrate.config import PRESETS, QuantizationConfig
    from tqdit.calibrate.flow import calibrate
    from tqdit.quantization.fake_quant import apply

_HOMES = {
    "PRESETS": "tqdit.calibrate.config",
    "QuantizationConfig": "tqdit.calibrate.config",
    "apply": "tqdit.quantization.fake_quant",
    "calibrate": "tqdit.calibrate.flow",
}


def __getattr__(name: str) -> Any:
    """On first use, since the command line describes this stage on machines without torch too."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tqdit.calibrate' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = ["PRESETS", "QuantizationConfig", "apply", "calibrate"]
