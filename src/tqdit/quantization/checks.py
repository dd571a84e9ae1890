"""What a scale table must satisfy, and the one line that says where it does not.

Messages are completed by the reader with the file's name in front.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import FileFormatError
from tqdit.quantization.seal import is_whole
from tqdit.quantization.table import (
    BOUNDARIES,
    FORMAT_VERSION,
    METADATA_KEY,
    ROLES,
    ROLES_OF_SCHEME,
    SCHEMES,
    TENSORS,
    TRAINING_STEPS,
    PerChannel,
    PerTensor,
    PerTimestepGroup,
    ScaleTable,
    Site,
    granularity_from_text,
)

Arrays = Mapping[str, NDArray[Any]]
AGAIN = "Calibrate again."
SMALLEST_STEP = float(np.finfo(np.float32).tiny)  # a denormal step divides to infinity where denormals are flushed


def parse(metadata: Mapping[str, str], tensors: Arrays) -> ScaleTable:
    """A table from the two parts of its file."""
    header = _header(metadata)
    if not is_whole(header, tensors):
        raise FileFormatError(f"truncated or altered (its SHA-256 differs). {AGAIN}")
    if not isinstance(header.get("sites"), list):
        raise FileFormatError(f"its metadata has no list of sites. {AGAIN}")
    if BOUNDARIES not in tensors:
        raise FileFormatError(f"'{BOUNDARIES}' is missing. {AGAIN}")
    sites = tuple(_site(entry, tensors) for entry in header["sites"])
    known = {BOUNDARIES} | {f"{site.name}.{key}" for site in sites for key in site.arrays()}
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise FileFormatError(f"'{unknown[0]}' belongs to no site that the metadata lists. {AGAIN}")
    try:
        return ScaleTable(
            model=str(header["model"]),
            fingerprint=str(header["fingerprint"]),
            boundaries=tensors[BOUNDARIES],
            sites=sites,
            seed=int(header["seed"]),
            guidance_scale=float(header["guidance_scale"]),
            settings=dict(header["settings"]),
            versions=dict(header["versions"]),
            errors={str(name): float(value) for name, value in header["errors"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"its '{METADATA_KEY}' metadata is damaged ({error!r}). {AGAIN}") from error


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise FileFormatError(
            f"not a scale table: it has no '{METADATA_KEY}' metadata. Pass a file that tqdit-calibrate wrote."
        )
    try:
        header = json.loads(metadata[METADATA_KEY])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"its '{METADATA_KEY}' metadata is damaged ({error!r}). {AGAIN}") from error
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"written in format {version}, this tqdit reads format {FORMAT_VERSION}. "
            "Calibrate again, or install the tqdit that wrote it."
        )
    return dict(header)


def _site(entry: Any, tensors: Arrays) -> Site:
    try:
        module, role, scheme = str(entry["module"]), entry["role"], str(entry["scheme"])
        bits, granularity = entry["bits"], str(entry["granularity"])
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"a site of its metadata is damaged ({error!r}). {AGAIN}") from error
    name = f"{module}.{role}"
    if scheme not in SCHEMES:
        raise FileFormatError(f"'{name}' has scheme '{scheme}'; known are {', '.join(SCHEMES)}. {AGAIN}")
    arrays = {}
    for key in TENSORS[scheme]:
        if f"{name}.{key}" not in tensors:
            raise FileFormatError(f"'{name}.{key}' is missing. {AGAIN}")
        arrays[key] = tensors[f"{name}.{key}"]
    try:
        quantizer = SCHEMES[scheme](bits=bits, granularity=granularity_from_text(granularity), **arrays)
    except FileFormatError as error:
        raise FileFormatError(f"'{name}': {error}") from error
    return Site(module, role, quantizer, tensors.get(f"{name}.codes"), tensors.get(f"{name}.divisor"))


def check_table(table: ScaleTable) -> None:
    """Raises FileFormatError on the first thing that is wrong."""
    _check_boundaries(table.boundaries)
    seen: set[str] = set()
    for site in table.sites:
        if site.name in seen:
            raise FileFormatError(f"'{site.name}' is listed twice. {AGAIN}")
        seen.add(site.name)
        check_site(site, table.groups)
    if not math.isfinite(table.guidance_scale):
        raise FileFormatError(f"the guidance scale is {table.guidance_scale}, expected a finite number. {AGAIN}")
    for module, error in table.errors.items():
        if not (math.isfinite(error) and error >= 0):
            raise FileFormatError(f"the error of '{module}' is {error}, expected a number >= 0. {AGAIN}")


def _check_boundaries(boundaries: NDArray[np.int64]) -> None:
    if boundaries.dtype != np.float64 or boundaries.ndim != 1:
        raise FileFormatError(
            f"'{BOUNDARIES}' is {boundaries.dtype}{list(boundaries.shape)}, expected int64[groups - 1]. {AGAIN}"
        )
    inside = not boundaries.size or (boundaries[0] >= 1 and boundaries[-1] < TRAINING_STEPS)
    if not inside or np.any(np.diff(boundaries) <= 0):
        raise FileFormatError(
            f"'{BOUNDARIES}' is {boundaries.tolist()}, expected increasing timesteps in 1..{TRAINING_STEPS - 1}. "
            f"{AGAIN}"
        )


def check_site(site: Site, groups: int) -> None:
    """One site of a table with `groups` groups of timesteps."""
    quantizer = site.quantizer
    if site.role not in ROLES:
        raise FileFormatError(f"'{site.name}' has role '{site.role}'; known are {', '.join(ROLES)}. {AGAIN}")
    if site.role not in ROLES_OF_SCHEME[quantizer.scheme]:
        raise FileFormatError(f"'{site.name}' has scheme '{quantizer.scheme}', which its role does not allow. {AGAIN}")
    if not isinstance(quantizer.bits, int) or not 2 <= quantizer.bits <= 8:
        raise FileFormatError(f"'{site.name}' has {quantizer.bits} bits, expected 2..8. {AGAIN}")
    shape = _scale_shape(site, groups)
    for key, array in site.arrays().items():
        if key in TENSORS[quantizer.scheme]:
            expected = () if key == "high_step" else shape
            _check_array(f"{site.name}.{key}", array, TENSORS[quantizer.scheme][key], expected)
    if site.divisor is not None:
        if site.role != "input":
            raise FileFormatError(f"'{site.name}.divisor' belongs to an input, not to a {site.role}. {AGAIN}")
        _check_array(f"{site.name}.divisor", site.divisor, "float32", (None,))
    _check_values(site)
    _check_codes(site)


def _scale_shape(site: Site, groups: int) -> tuple[int | None, ...]:
    match site.quantizer.granularity:
        case PerTensor():
            return ()
        case PerChannel() if site.role == "weight":
            return (None,)
        case PerTimestepGroup(n) if site.role != "weight":
            if n != groups:
                raise FileFormatError(
                    f"'{site.name}' has {n} groups, the table's boundaries make {groups}. "
                    f"Calibrate again with --groups {groups}."
                )
            return (n,)
    raise FileFormatError(
        f"'{site.name}' has granularity {site.quantizer.granularity}; weights are per tensor or channel, "
        f"activations per tensor or group. {AGAIN}"
    )


def _check_array(name: str, array: NDArray[Any], dtype: str, shape: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits or array.size == 0:
        expected = f"{dtype}{['channels' if size is None else size for size in shape]}"
        raise FileFormatError(f"'{name}' is {array.dtype}{list(array.shape)}, expected {expected}. {AGAIN}")
    if dtype != "float32":
        return
    if not np.all(np.isfinite(array)):
        raise FileFormatError(f"'{name}' holds NaN or infinite values, expected steps > 0. {AGAIN}")
    if np.any(array < SMALLEST_STEP):
        raise FileFormatError(
            f"'{name}' holds {array.min():.3g}, expected steps of at least {SMALLEST_STEP:.3g} (no zero, negative or "
            f"denormal ones). {AGAIN}"
        )


def _check_values(site: Site) -> None:
    quantizer = site.quantizer
    if quantizer.scheme == "asymmetric":
        zero_point, top = site.arrays()["zero_point"], 2**quantizer.bits - 1
        if zero_point.min() < 0 or zero_point.max() > top:
            raise FileFormatError(f"'{site.name}.zero_point' holds values outside 0..{top}. {AGAIN}")
    if quantizer.scheme == "softmax":
        arrays = site.arrays()
        if np.any(arrays["low_step"] > arrays["high_step"]):
            raise FileFormatError(f"'{site.name}.low_step' is above its high step. {AGAIN}")


def _check_codes(site: Site) -> None:
    if site.codes is None:
        return
    q = 2 ** (site.quantizer.bits - 1)
    if site.role != "weight" or site.codes.dtype != np.int8:
        raise FileFormatError(f"'{site.name}.codes' is {site.codes.dtype}, expected int8 codes of a weight. {AGAIN}")
    if site.codes.size == 0 or site.codes.min() < -q or site.codes.max() > q - 1:
        raise FileFormatError(
            f"'{site.name}.codes' leaves -{q}..{q - 1}, the range of {site.quantizer.bits} bits. {AGAIN}"
        )
    granularity = site.quantizer.granularity
    if isinstance(granularity, PerChannel):
        channels = site.arrays()["scale"].shape[0]
        if granularity.axis >= site.codes.ndim or site.codes.shape[granularity.axis] != channels:
            raise FileFormatError(
                f"'{site.name}.codes' has shape {site.codes.shape}, its {channels} scales do not fit axis "
                f"{granularity.axis}. {AGAIN}"
            )
