"""Calibration: a float diffusion transformer in, a scale table out (docs/calibration.md).

`apply(model, table)` gives the fake-quantized model that a table means; exports must compute the same.
"""

from tqdit.calibrate.fake_quant import apply

__all__ = ["apply"]
