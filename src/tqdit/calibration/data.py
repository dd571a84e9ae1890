"""Calibration rows from a user's own latents or images (`--data`), noised with known noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.rows import CalibrationRows, pick, renoise
from tqdit.errors import UsageError
from tqdit.files import NPZ, NPZ_ERRORS, npz_headers, read_npz, reading, sha256
from tqdit.models.loaded import LoadedModel
from tqdit.ports import Signature, check_requests
from tqdit.sampling.schedule import SamplingSpec

T = TypeVar("T")
IMAGE_NAMES = ("arr_0", "images", "latents", "x")
LABEL_NAMES = ("arr_1", "labels", "y")  # of a class, whatever the port's name


@dataclass(frozen=True, eq=False)
class DataSet:
    """x0 float32 (B, ...) in the model's own space, request port -> values (B, ...), and the digest of the file."""

    x0: NDArray[np.float32]
    requests: dict[str, NDArray[Any]]
    sha256: str

    def __len__(self) -> int:
        return len(self.x0)


def check_data(path: Path) -> None:
    """Refuse, before a model is loaded, a file that `read_data` would refuse for any model."""
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file. Pass an .npz of images or latents, with labels if the model takes a class."
        )
    with reading(path, NPZ, "Write it again.", *NPZ_ERRORS), path.open("rb") as file:
        headers = npz_headers(str(path), file)
    _first(path, headers, IMAGE_NAMES)


def read_data(path: Path, model: LoadedModel) -> DataSet:
    """An `.npz` with images uint8 (B, H, W, C), or states float (B, C, ...), and what each of them was asked for with.

    Images have the names that tqdit-sample and the ADM evaluator use (arr_0), or `images` or `latents`; the values of a
    request port have its name, those of the only port, if it takes a class, also arr_1 or `labels`.
    """
    check_data(path)
    arrays, signature = read_npz(path), model.signature
    x0 = _first(path, arrays, IMAGE_NAMES)
    if x0.dtype == np.uint8 and x0.ndim > 1:
        x0 = np.moveaxis(x0, -1, 1).astype(np.float32) / 127.5 - 1
    expected = signature.state.row_shape
    if x0.shape[1:] != expected or not len(x0) or not np.issubdtype(x0.dtype, np.floating):
        raise UsageError(
            f"{path}: holds {x0.dtype}{list(x0.shape)}, the model works on {list(expected)}. Pass uint8 images "
            "(B, H, W, C) for a pixel model, or float latents (B, C, H, W) of its VAE, scaled as the model expects."
        )
    if not np.isfinite(x0).all():
        raise UsageError(f"{path}: holds NaN or infinite values.")
    return DataSet(x0.astype(np.float32), _requests(path, arrays, signature, len(x0)), sha256(path))


def _requests(
    path: Path, arrays: Mapping[str, NDArray[Any]], signature: Signature, count: int
) -> dict[str, NDArray[Any]]:
    label = signature.label
    found = {
        name: _first(path, arrays, (name, *LABEL_NAMES) if label is not None else (name,))
        for name in signature.request_values
    }
    if not found:
        return {}
    try:
        rows, values = check_requests(signature, found)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    if rows != count:
        raise UsageError(f"{path}: {count} images, but {rows} of {', '.join(values)}; expected one for each image.")
    if label is not None and label.choices is not None and (values[label.name] >= label.choices).any():
        raise UsageError(f"{path}: holds labels outside 0..{label.choices - 1}.")
    return values


def _first(path: Path, arrays: Mapping[str, T], names: tuple[str, ...]) -> T:
    for name in names:
        if name in arrays:
            return arrays[name]
    raise UsageError(f"{path}: none of {', '.join(names)} is among its arrays ({', '.join(arrays)}).")


def data_rows(model: LoadedModel, spec: SamplingSpec, config: QuantizationConfig, data: DataSet) -> CalibrationRows:
    """Rows from the data set instead of chains: the same steps, each from one of its images in turn."""
    if config.boundaries == "drift":
        raise UsageError("--boundaries drift is measured on the model's own chains. Leave out --data, or pass even.")
    picks = pick(model, config, chains=len(data.x0))
    return renoise(model, spec, picks, data.x0, data.requests, config.seed)
