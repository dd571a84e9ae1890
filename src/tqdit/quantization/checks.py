"""What the parts of a scale table must satisfy. Every message names the tensor, what was found and what was expected.

The reader of a file puts the file's name in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import FileFormatError
from tqdit.quantization.granularity import ROLES, PerChannel, PerTensor, PerTimestepGroup, PerToken, Role
from tqdit.quantization.quantizer import Quantizer, Shape
from tqdit.quantization.rounding import SMALLEST_SCALE, code_range

AGAIN = "Calibrate again."
BOUNDARIES = "boundaries"  # name of the tensor with the group boundaries


def check_boundaries(boundaries: NDArray[np.float64]) -> None:
    if boundaries.dtype != np.float64 or boundaries.ndim != 1:
        raise FileFormatError(
            f"'{BOUNDARIES}' is {boundaries.dtype}{list(boundaries.shape)}, expected float64[groups - 1]. {AGAIN}"
        )
    if not np.all(np.isfinite(boundaries)) or np.any(np.diff(boundaries) <= 0):
        raise FileFormatError(f"'{BOUNDARIES}' is {boundaries.tolist()}, expected increasing finite numbers. {AGAIN}")


def check_quantizer(name: str, role: Role, quantizer: Quantizer, groups: int) -> None:
    """The quantizer of the site `name`, in a table with `groups` groups of timesteps."""
    if role not in ROLES:
        raise FileFormatError(f"'{name}' has role '{role}'; known are {', '.join(ROLES)}. {AGAIN}")
    if role not in quantizer.roles:
        raise FileFormatError(f"'{name}' has scheme '{quantizer.scheme}', which its role does not allow. {AGAIN}")
    if not isinstance(quantizer.bits, int) or not 2 <= quantizer.bits <= 8:
        raise FileFormatError(f"'{name}' has {quantizer.bits} bits, expected 2..8. {AGAIN}")
    shape = _scale_shape(name, role, quantizer, groups)
    for key, array in quantizer.arrays().items():
        check_array(f"{name}.{key}", array, quantizer.tensors[key], quantizer.shape(key, shape))
    problem = quantizer.problem(name)
    if problem is not None:
        raise FileFormatError(f"{problem}. {AGAIN}")


def _scale_shape(name: str, role: Role, quantizer: Quantizer, groups: int) -> Shape:
    match quantizer.granularity:
        case PerToken() if not quantizer.tensors:
            return ()
        case _ if not quantizer.tensors:
            pass  # there is no scale that another granularity could have
        case PerTensor():
            return ()
        case PerChannel() if role == "weight":
            return (None,)
        case PerTimestepGroup(n) if role != "weight":
            if n != groups:
                raise FileFormatError(
                    f"'{name}' has {n} groups, the table's boundaries make {groups}. "
                    f"Calibrate again with --groups {groups}."
                )
            return (n,)
    raise FileFormatError(
        f"'{name}' has granularity {quantizer.granularity}; weights are per tensor or channel, "
        f"activations per tensor or group, or per token if their scheme stores no scale. {AGAIN}"
    )


def check_array(name: str, array: NDArray[Any], dtype: str, shape: Shape) -> None:
    """Type and shape (None: any size), and for float32 that all values are finite and > 0."""
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits or array.size == 0:
        expected = f"{dtype}{['channels' if size is None else size for size in shape]}"
        raise FileFormatError(f"'{name}' is {array.dtype}{list(array.shape)}, expected {expected}. {AGAIN}")
    if dtype != "float32":
        return
    if not np.all(np.isfinite(array)):
        raise FileFormatError(f"'{name}' holds NaN or infinite values, expected scales > 0. {AGAIN}")
    if np.any(array < SMALLEST_SCALE):
        raise FileFormatError(
            f"'{name}' holds {array.min():.3g}, expected scales of at least {SMALLEST_SCALE:.3g} (no zero, negative or "
            f"denormal ones). {AGAIN}"
        )


def check_codes(name: str, role: Role, quantizer: Quantizer, codes: NDArray[np.int8]) -> None:
    """The stored integers of a weight, under `name`."""
    low, high = code_range(quantizer.bits)
    if role != "weight" or codes.dtype != np.int8:
        raise FileFormatError(f"'{name}' is {codes.dtype}, expected int8 codes of a weight. {AGAIN}")
    if codes.size == 0 or codes.min() < low or codes.max() > high:
        raise FileFormatError(f"'{name}' leaves {low}..{high}, the range of {quantizer.bits} bits. {AGAIN}")
    granularity = quantizer.granularity
    if isinstance(granularity, PerChannel):
        channels = len(quantizer.arrays()["scale"])
        if granularity.axis >= codes.ndim or codes.shape[granularity.axis] != channels:
            raise FileFormatError(
                f"'{name}' has shape {codes.shape}, its {channels} scales do not fit axis {granularity.axis}. {AGAIN}"
            )


def check_divisor(name: str, role: Role, divisor: NDArray[np.float32]) -> None:
    """The divisors of an input's channels, under `name`."""
    if role != "input":
        raise FileFormatError(f"'{name}' belongs to an input, not to a {role}. {AGAIN}")
    check_array(name, divisor, "float32", (None,))


def check_layer(name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """The tensors of a layer's rewrites, under `name`."""
    if not arrays or not set(arrays) <= {"divisor", "up", "down"} or ("up" in arrays) != ("down" in arrays):
        raise FileFormatError(f"'{name}' has {', '.join(sorted(arrays))}, expected divisor, or up and down. {AGAIN}")
    if "divisor" in arrays:
        check_array(f"{name}.divisor", arrays["divisor"], "float32", (None,))
    for key in sorted({"up", "down"} & set(arrays)):
        check_array(f"{name}.{key}", arrays[key], "float16", (None, None))
        if not np.all(np.isfinite(arrays[key])):
            raise FileFormatError(f"'{name}.{key}' holds NaN or infinite values, expected numbers. {AGAIN}")
