"""Calibration rows from a user's own latents or images (`--data`), noised with known noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.rows import CalibrationRows, pick, renoise
from tqdit.errors import UsageError
from tqdit.files import NPZ, NPZ_ERRORS, npz_headers, read_npz, reading, sha256
from tqdit.models.loaded import LoadedModel
from tqdit.sampling.schedule import SamplingSpec

T = TypeVar("T")
IMAGE_NAMES = ("arr_0", "images", "latents", "x")
LABEL_NAMES = ("arr_1", "labels", "class_labels", "y")


@dataclass(frozen=True, eq=False)
class DataSet:
    """x0 float32 (B, C, H, W) in the model's own space, labels int64 (B,), and the digest of the file."""

    x0: NDArray[np.float32]
    labels: NDArray[np.int64]
    sha256: str

    def __len__(self) -> int:
        return len(self.x0)


def check_data(path: Path) -> None:
    """Refuse, before a model is loaded, a file that `read_data` would refuse for any model."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Pass an .npz of images or latents with labels.")
    with reading(path, NPZ, "Write it again.", *NPZ_ERRORS), path.open("rb") as file:
        headers = npz_headers(str(path), file)
    for names in (IMAGE_NAMES, LABEL_NAMES):
        _first(path, headers, names)


def read_data(path: Path, model: LoadedModel) -> DataSet:
    """An `.npz` with images uint8 (B, H, W, C), or latents or images float (B, C, H, W), and their labels.

    Names are those that tqdit-sample and the ADM evaluator use (arr_0, arr_1), or `images` / `latents` and `labels`.
    """
    check_data(path)
    arrays = read_npz(path)
    x0 = _first(path, arrays, IMAGE_NAMES)
    labels = _first(path, arrays, LABEL_NAMES)
    if x0.dtype == np.uint8:
        x0 = x0.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1 if x0.ndim == 4 else x0
    expected, port = model.signature.state.row_shape, model.signature.label
    if port is None or port.choices is None:
        raise UsageError(f"{path}: --data is for models of classes; {model.signature.family} takes other requests.")
    if x0.ndim != 4 or x0.shape[1:] != expected or not np.issubdtype(x0.dtype, np.floating):
        raise UsageError(
            f"{path}: holds {x0.dtype}{list(x0.shape)}, the model works on {list(expected)}. Pass uint8 images "
            "(B, H, W, C) for a pixel model, or float latents (B, C, H, W) of its VAE, scaled as the model expects."
        )
    if labels.shape != x0.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{path}: its labels are {labels.dtype}{list(labels.shape)}, expected {len(x0)} integers.")
    if not np.isfinite(x0).all() or not ((labels >= 0) & (labels < port.choices)).all():
        raise UsageError(f"{path}: holds NaN or infinite values, or labels outside 0..{port.choices - 1}.")
    return DataSet(x0.astype(np.float32), labels.astype(np.int64), sha256(path))


def _first(path: Path, arrays: Mapping[str, T], names: tuple[str, ...]) -> T:
    for name in names:
        if name in arrays:
            return arrays[name]
    raise UsageError(f"{path}: none of {', '.join(names)} is among its arrays ({', '.join(arrays)}).")


def data_rows(model: LoadedModel, spec: SamplingSpec, config: QuantizationConfig, data: DataSet) -> CalibrationRows:
    """Rows from the data set instead of chains: the same steps, each from one of its images in turn."""
    if config.boundaries == "drift":
        raise UsageError("--boundaries drift is measured on the model's own chains. Leave out --data, or pass even.")
    port = model.signature.label
    assert port is not None
    picks = pick(model, config, chains=len(data.x0))
    return renoise(model, spec, picks, data.x0, {port.name: data.labels}, config.seed)
