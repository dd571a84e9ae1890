"""Facts of a pipeline's loop, fitted by least squares. One that does not hold is refused, with its residual."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqdit.errors import UsageError
from tqdit.models.calls import DROP_IN_ONLY, Call
from tqdit.ports import NEGATIVE
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Sign

ALIKE = 1e-6  # relative difference of predictions that float32 does not tell apart
TIME_MAPS = ((1.0, 0.0), (1e-3, 0.0), (-1e-3, 1.0), (-1.0, 1000.0))  # scale and shift that pipelines use


def find_state(call: Call, sample: Tensor, tolerance: float) -> str:
    """The argument that is the scheduler's sample, scaled."""
    for name, tensor in call.tensors.items():
        rows = tensor[: len(sample)] if tensor.ndim else tensor
        if rows.numel() == sample.numel() and _scale_of(rows, sample)[1] < tolerance:
            return name
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in call.tensors.items())
    raise UsageError(
        f"no argument of the transformer is the scheduler's sample {tuple(sample.shape)}; found {shapes}. "
        f"{DROP_IN_ONLY}"
    )


def _scale_of(x: Tensor, sample: Tensor) -> tuple[float, float]:
    """s of x = s sample, and the residual."""
    a, b = x.double().flatten().cpu(), sample.double().flatten().cpu()
    scale = float(a @ b / (b @ b))
    return scale, float((a - scale * b).norm() / a.norm())


def is_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.numel() != b.numel():
        return False
    a, b = a.double().flatten(), b.double().flatten()
    return float((a - b).norm()) <= tolerance * float(b.norm())


def check_scaled(states: Tensor, sample: Tensor, tolerance: float) -> None:
    for start in range(0, len(states), len(sample)):
        residual = _scale_of(states[start : start + len(sample)], sample)[1]
        if residual > tolerance:
            raise UsageError(
                f"a row's state is not the scheduler's sample times a factor (residual {residual:.1e}). {DROP_IN_ONLY}"
            )


def fit_weights(model_output: Tensor, output: Tensor, roles: int, tolerance: float) -> NDArray[np.float64]:
    """Weights (roles,) of the predictions of each role in what the scheduler gets; NaN if the predictions are alike."""
    target = model_output.double().cpu()
    parts = [part[:, : target.shape[1]].double().cpu().flatten() for part in output.chunk(roles)]
    matrix, y = torch.stack(parts, 1), target.flatten()
    if matrix.shape[0] != len(y):
        raise UsageError(f"the scheduler gets {tuple(model_output.shape)} of a prediction {tuple(output.shape)}.")
    fit = torch.linalg.lstsq(matrix, y[:, None], rcond=ALIKE, driver="gelsd")
    weights = fit.solution[:, 0]
    residual = float((matrix @ weights - y).norm() / y.norm())
    if residual > tolerance:
        raise UsageError(
            f"what the scheduler gets is not a weighted sum of the network's predictions (residual {residual:.1e}, "
            f"expected less than {tolerance:.0e}). {DROP_IN_ONLY}"
        )
    return weights.numpy() if int(fit.rank) == roles else np.full(roles, np.nan)


def fit_time(times: list[tuple[float, float]], tolerance: float) -> tuple[float, float]:
    """(a, b) of the network's timestep a t + b."""
    t, found = np.array(times).T
    size = np.abs(found).max() or 1.0
    for scale, shift in TIME_MAPS:
        if np.abs(scale * t + shift - found).max() <= tolerance * size:
            return scale, shift
    if len(set(t)) > 1:
        scale, shift = np.polyfit(t, found, 1)
        if np.abs(scale * t + shift - found).max() <= tolerance * size:
            return float(scale), float(shift)
    raise UsageError("the network's timestep is not a linear function of the scheduler's.")


def fit_guidance(
    chains: list[NDArray[np.float64]], tolerance: float
) -> tuple[Guidance | None, Sign, dict[str, int]]:  # fmt: skip
    """Guidance, the sign of the prediction, and the place of the conditional and the unconditional role.

    chains: of each the weights of its steps, (T, roles).
    """
    # an empty prompt beside an empty negative one tells nothing
    chains = [told for weights in chains if len(told := weights[np.isfinite(weights).all(1)])]
    if not chains:
        raise UsageError("the conditional and the unconditional predictions are alike in all steps. Record a prompt.")
    means = [weights.mean(0) for weights in chains]
    mean = np.concatenate(chains).mean(0)
    limit = 10 * tolerance * np.abs(mean).max()
    spread = max(np.abs(weights - own).max() for weights, own in zip(chains, means, strict=True)) / np.abs(mean).max()
    text = ", ".join(f"{weight:.3g}" for weight in mean)
    if spread > 10 * tolerance:
        raise UsageError(
            f"the weights of the predictions change from step to step by {spread:.1e} (mean {text}). {DROP_IN_ONLY}"
        )
    if others := [each for each in means if np.abs(each - means[0]).max() > limit]:
        found = " and ".join(f"{np.abs(each).max():.4g}" for each in (means[0], others[0]))
        raise UsageError(f"the recorded chains have guidance scales {found}. Record one kind at a time.")
    sign: Sign = 1 if mean.sum() > 0 else -1
    if len(mean) > 2 or abs(abs(mean.sum()) - 1) > limit:
        raise UsageError(f"the predictions of a step have weights {text}; expected one, or g and 1 - g of guidance.")
    if len(mean) == 1:
        return None, sign, {"": 0}
    conditional = int(np.argmax(sign * mean))
    scale = float(np.round(sign * mean[conditional], 3 if tolerance > 1e-3 else 5))
    return Guidance(scale), sign, {"": conditional, NEGATIVE: 1 - conditional}
