"""Schedules, samplers, guidance and noise, in NumPy: each formula once, for calibration, graphs and the runtime."""
