"""Golden calls: a few network calls of the float model, kept by calibration, which prove that an engine is right.

They travel in the scale table, the ONNX file and the bundle. An engine computes them again; its error against the float
predictions must be the one that the fake-quantized network has. Torch-free.
"""

from __future__ import annotations

import base64
import io
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import FileFormatError, VerificationError

Array = NDArray[np.generic]
CALLS_KEY = "tqdit_calls"  # of an ONNX file's metadata
PREDICTION, ERRORS, PORT = "prediction", "errors", "port."
MOST_BYTES = 2**26
CALLS = 8
# An engine's mean error may exceed the expected one by this factor, since codes flip where float operations differ in
# their last bit, and by what the float parts cost in the engine's float type.
FACTOR = 1.25
FLOAT_ERRORS = {"fp32": 1e-6, "fp16": 1e-4, "bf16": 2e-3}
CAUSES = "another file's scales or weights, a wrong input, or an operation that the backend computes differently"


@dataclass(frozen=True, eq=False)
class GoldenCalls:
    """K calls of one row each. inputs: port -> (K, ...). prediction float32 (K, ...): the float model's.

    errors float64 (K,): of the fake-quantized network, sum (y - prediction)^2 / sum prediction^2; 0 for a float one.
    """

    inputs: Mapping[str, Array]
    prediction: NDArray[np.float32]
    errors: NDArray[np.float64]

    def __post_init__(self) -> None:
        counts = {len(array) for array in (*self.inputs.values(), self.prediction, self.errors)}
        arrays = (*self.inputs.values(), self.prediction, self.errors)
        sound = all(array.dtype.kind in "biuf" and np.isfinite(array).all() for array in arrays)
        if not sound:
            raise FileFormatError(
                "golden calls hold NaN or infinite values. Look for them in the model's weights, or get the file again."
            )
        if len(counts) != 1 or self.errors.ndim != 1 or not len(self.errors) or self.errors.min() < 0:
            raise FileFormatError(f"golden calls of {sorted(counts)} rows; expected as many of each, and errors >= 0.")

    def __len__(self) -> int:
        return len(self.errors)

    def arrays(self) -> dict[str, Array]:
        """As named arrays, for a file."""
        ports = {f"{PORT}{name}": array for name, array in self.inputs.items()}
        return ports | {PREDICTION: self.prediction, ERRORS: self.errors}

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> GoldenCalls:
        """Raises FileFormatError for arrays that `arrays` did not give."""
        ports = {name.removeprefix(PORT): array for name, array in arrays.items() if name.startswith(PORT)}
        try:
            prediction, errors = (np.asarray(arrays[name]) for name in (PREDICTION, ERRORS))
        except KeyError as error:
            raise FileFormatError(f"golden calls without {error}.") from error
        return cls(ports, prediction.astype(np.float32), errors.astype(np.float64))

    def save(self, path: Path) -> None:
        """Write them as an .npz."""
        np.savez(path, **self.arrays())  # type: ignore[arg-type]

    def to_text(self) -> str:
        """As the metadata of an ONNX file: an .npz in base64."""
        buffer = io.BytesIO()
        np.savez(buffer, **self.arrays())  # type: ignore[arg-type]
        return base64.b64encode(buffer.getvalue()).decode()

    @classmethod
    def from_text(cls, text: str, where: str) -> GoldenCalls:
        """Raises FileFormatError naming `where` if the text is damaged."""
        try:
            with np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False) as content:
                return cls.of(dict(content))
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, FileFormatError) as error:
            raise FileFormatError(f"{where}: its golden calls are damaged ({error}). Export again.") from error


@dataclass(frozen=True)
class Verdict:
    """What an engine made of golden calls, (K,) each."""

    found: NDArray[np.float64]
    expected: NDArray[np.float64]
    float_error: float  # that the engine's float type may add

    @property
    def limit(self) -> float:
        return FACTOR * float(self.expected.mean()) + self.float_error

    @property
    def passes(self) -> bool:
        return bool(self.found.mean() <= self.limit)

    def check(self, what: str) -> None:
        """Raises VerificationError, naming the worst call, if the engine is not right."""
        if self.passes:
            return
        worst = int(np.argmax(self.found - self.expected))
        raise VerificationError(
            f"{what}: its mean error against the float model on golden calls is {self.found.mean():.1e}, expected "
            f"at most {self.limit:.1e}; the worst is call {worst} with {self.found[worst]:.1e} (expected "
            f"{self.expected[worst]:.1e}). Usual causes: {CAUSES}."
        )


def verify(
    calls: GoldenCalls, network: Callable[[Mapping[str, Array]], NDArray[np.float32]], float_type: str
) -> Verdict:
    """Run the calls. network: ports by name to the prediction, such as an engine."""
    found = relative_errors(network(calls.inputs), calls.prediction)
    return Verdict(found, calls.errors, FLOAT_ERRORS[float_type])


def relative_errors(found: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """sum (found - reference)^2 / sum reference^2 of each row, (K,); infinite for NaN."""
    axes = tuple(range(1, reference.ndim))
    reference = reference.astype(np.float64)
    errors = np.square(found - reference).sum(axes) / np.maximum(np.square(reference).sum(axes), 1e-30)
    return np.where(np.isfinite(errors), errors, np.inf)
