"""Stage 1: a float diffusion transformer in, a scale table out (docs/calibration.md).

`flow.calibrate` finds scales, `config.QuantizationConfig` holds every knob, `config.PRESETS` the named sets of them.
"""
