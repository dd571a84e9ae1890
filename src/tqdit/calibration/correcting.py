"""PTQD's correction (arXiv 2305.10657): the quantized network's errors along chains of the float one, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.rows import random_requests, sampling_of
from tqdit.calibration.work import WorkFolder
from tqdit.errors import SamplingError
from tqdit.models.loaded import LoadedModel
from tqdit.sampling.chains import Chains
from tqdit.sampling.correction import MOST, Correction
from tqdit.sampling.process import Float64

IMAGES = 16
FIRST_IMAGE = 2**42  # of their noise, apart from that of calibration rows and of what anybody samples
SAVES = 25
Float32 = NDArray[np.float32]


def find_correction(
    model: LoadedModel, quantized: LoadedModel, config: QuantizationConfig, folder: WorkFolder,
    done: Callable[[int], object], requests: Mapping[str, NDArray[Any]] | None = None,
) -> Correction:  # fmt: skip
    """Both networks on the same states; the chains go on with the float prediction. Continued from the work folder.

    requests: what the chains are asked for in turn, (n, ...); None: drawn at random. done: told the number of chains
    after each step. Raises SamplingError if a chain becomes NaN or infinite, or the quantized network's
    errors are beyond `MOST`.
    """
    spec = sampling_of(model, config)
    scale = 1.0 if config.guidance_scale is None else config.guidance_scale
    chains = Chains(model.signature, model.guidance, IMAGES)
    requests = random_requests(model.signature, IMAGES, config.seed) if requests is None else requests
    for image in range(IMAGES):
        request = {name: values[image % len(values)] for name, values in requests.items()}
        chains.add(spec.schedule, request, scale, config.seed, FIRST_IMAGE + image)
    found = np.zeros((spec.steps, 2 + chains.x.shape[1]))  # slope, deviation and biases of each step
    state = folder.load_or_none("correction")
    if state is not None:
        arrays = {name: tensor.cpu().numpy() for name, tensor in state.items()}
        found = arrays.pop("found")
        chains.restore(arrays)
    for _ in range(spec.steps - 1 - chains.step_of(0)):
        done(0)
    while (step := chains.step_of(0)) >= 0:
        inputs = chains.inputs()
        exact, wrong = model(inputs), quantized(inputs)
        finite = chains.advance(exact)
        if not finite.all():
            raise chains.failure(int(np.flatnonzero(~finite)[0]))
        prediction = wrong[:, : chains.x.shape[1]].copy()
        if model.guidance is not None:
            prediction = prediction[:IMAGES]
            model.guidance.combine(wrong, np.full(IMAGES, scale, np.float32), prediction)
        slope, bias, deviation = fit(chains.prediction, prediction)
        found[step] = slope, deviation, *bias
        if not (np.abs(found[step]) <= MOST).all():
            raise SamplingError(
                f"the quantized network predicts NaN or values beyond {MOST:g} at step {step} of {spec.steps}. "
                "Calibrate with more bits, or check the model."
            )
        if step % max(1, spec.steps // SAVES) == 0:
            arrays = {**chains.snapshot(), "found": found}
            folder.save("correction", {name: torch.from_numpy(array) for name, array in arrays.items()})
        done(IMAGES)
    timesteps, places = np.unique(spec.schedule.timesteps, return_inverse=True)
    of_step = places == np.arange(len(timesteps))[:, None]  # a sampler may call the network twice at a timestep
    found = of_step @ found / of_step.sum(1, keepdims=True)
    biases = tuple(map(tuple, found[:, 2:].tolist()))
    return Correction(
        tuple(timesteps.tolist()), scale, tuple(found[:, 0].tolist()), biases, tuple(found[:, 1].tolist())
    )


def fit(exact: Float32, found: Float32) -> tuple[float, Float64, float]:
    """(k, b (C,), sigma_q) of predictions (N, C, ...): the slope of the error on the prediction over all elements, at
    least 0; the mean of what is left of each channel; and the deviation of what is left after the correction."""
    e = exact.astype(np.float64).reshape(*exact.shape[:2], -1)
    d = found.astype(np.float64).reshape(e.shape) - e
    centred = e - e.mean()
    energy = float(np.square(centred).sum())
    slope = max(0.0, float((centred * d).sum()) / energy) if energy > 0 else 0.0
    bias: Float64 = (d - slope * e).mean(axis=(0, 2))
    left = (d - slope * e - bias[:, None]) / (1 + slope)
    return slope, bias, float(np.sqrt(np.square(left).mean()))
