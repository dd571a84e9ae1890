"""A sampling run without its network, on disk: for programs that run an engine in another language.

docs/engine-bundle.md describes the file, and `examples/cpp` reads it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit import safetensors_file
from tqdit.bounds import check_disk
from tqdit.card import GraphCard
from tqdit.errors import OutputError, UsageError
from tqdit.files import whole_file
from tqdit.safetensors_file import Shapes
from tqdit.sampling import chains, noise
from tqdit.sampling.schedule import SamplingSpec
from tqdit.version import __version__

FORMAT_VERSION = 1
METADATA_KEY = "tqdit_noise"
MOST_BYTES = 10**9


def check_noise_file(path: Path) -> None:
    """Refuse a name that is not that of a noise file, and to replace a file that is none."""
    if path.suffix != ".safetensors":
        raise UsageError(f"--save-noise {path}: expected a name that ends in .safetensors.")
    if path.exists() and not _is_noise_file(path):
        raise OutputError(f"{path}: exists and is not a noise file. Choose another name, or remove it.")


def check_size(path: Path, card: GraphCard, spec: SamplingSpec, count: int) -> None:
    """Refuse a file that cannot tell the chain, is too large to be useful, or for its disk."""
    if spec.full_calls:
        raise UsageError(
            f"--save-noise is for a loop with a full call at every step; found {spec}. Pass --full-calls {spec.steps}."
        )
    if card.correction is not None:
        raise UsageError(
            "--save-noise: this engine's chains take back the network's errors (tqdit-calibrate --correction), which "
            "the file cannot tell. Calibrate without it."
        )
    rows = _rows(spec)
    size = 4 * count * rows * math.prod(card.state_shape)
    if size > MOST_BYTES:
        raise UsageError(
            f"--save-noise: {rows} arrays of noise for each of {count} images are {size / 1e9:,.1f} GB, expected at "
            f"most {MOST_BYTES / 1e9:g} GB. Pass a smaller -n."
        )
    check_disk(path, size, "Pass a smaller -n.")


def write_noise(path: Path, card: GraphCard, spec: SamplingSpec, seed: int, count: int) -> None:
    """The schedule's table, and the noise of images 0 to count - 1."""
    schedule, rows = spec.schedule, _rows(spec)
    arrays: dict[str, NDArray[Any]] = {
        "coefficients": chains.coefficients(schedule),
        "initial_scale": np.array(schedule.initial_scale, np.float32),
        "timesteps": schedule.timesteps.astype(np.float64),
    }
    shapes: Shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    shapes["noise"] = np.dtype(np.float32), (rows, count, *card.state_shape)
    facts = {
        "format_version": FORMAT_VERSION, "fingerprint": card.fingerprint, "sampler": spec.sampler, "steps": spec.steps,
        "seed": seed, "written_by": __version__,
    }  # fmt: skip
    normals, drawn = noise.Normals(card.state_shape), np.empty((count, *card.state_shape), np.float32)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(safetensors_file.header({METADATA_KEY: json.dumps(facts)}, shapes))
        for array in arrays.values():
            file.write(array.tobytes())
        for step in range(noise.INITIAL, rows - 1):
            normals.fill_rows(drawn, [(seed, image, step) for image in range(count)])
            file.write(drawn.tobytes())


def _rows(spec: SamplingSpec) -> int:
    """Arrays of noise of an image: the initial one, and one of each step if any step adds noise."""
    return 1 + spec.steps * spec.schedule.is_stochastic


def _is_noise_file(path: Path) -> bool:
    try:
        return METADATA_KEY in safetensors_file.read_metadata(path)
    except (OSError, ValueError):
        return False
