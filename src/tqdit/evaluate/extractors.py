"""Networks that turn images into the features that FID and its like are taken of. One interface, two rows.

judge      the demo model's classifier: 128 features, 16 classes
inception  FID's InceptionV3 as torch-fidelity holds it, with weights from a local file; nothing is downloaded
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tqdit.calibration.device import choose_device, exact_arithmetic
from tqdit.demo.glyphs import CLASSES, IMAGE_SIZE
from tqdit.demo.judge import load_judge
from tqdit.errors import CheckpointError, MissingLibraryError, UsageError
from tqdit.models.products import watched
from tqdit.models.state import read_tensors

BATCH = 64  # images per call of a network, fixed: a batch decides the last bits of a convolution
SPATIAL_CHANNELS = 7  # of the 192 of mixed_6/conv, as the ADM evaluator takes them
INCEPTION_LAYOUT = "weights-inception-2015-12-05"


@dataclass(frozen=True, eq=False)
class Features:
    """Of N images: pooled float32 (N, D), spatial float32 (N, S) or None, class probabilities float32 (N, K)."""

    pooled: NDArray[np.float32]
    spatial: NDArray[np.float32] | None
    probabilities: NDArray[np.float32]

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """The features of all images of the parts."""
        spatial = [part.spatial for part in parts if part.spatial is not None]
        return cls(
            np.concatenate([part.pooled for part in parts]),
            np.concatenate(spatial) if spatial else None,
            np.concatenate([part.probabilities for part in parts]),
        )


class Extractor(Protocol):
    """`name` says which network, `digest` which weights: numbers of different ones cannot be compared."""

    name: str
    digest: str
    size: int  # D
    classes: int  # K
    is_judge: bool  # whether images are labelled with its classes

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Features of images (N, H, W, 3), whatever N is."""
        ...


def identity(extractor: Extractor) -> str:
    """ "name digest", as files of statistics and features name what they are of."""
    return f"{extractor.name} {extractor.digest}"


class JudgeExtractor:
    """The classifier that ships with the demo model. It has no spatial features, so no sFID."""

    name = "judge"
    size, classes, is_judge = 128, len(CLASSES), True

    def __init__(self) -> None:
        self._judge = load_judge()
        self.digest = weights_digest(self._judge.state_dict())

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise UsageError(
                f"the judge knows images of {IMAGE_SIZE}x{IMAGE_SIZE}, these are {images.shape[2]}x{images.shape[1]}. "
                "Pass --inception-weights FILE for other models."
            )
        parts = (self._judge(x.float() / 127.5 - 1) for x in batches(images))
        return Features.join(
            [Features(pooled.numpy(), None, logits.softmax(dim=1).numpy()) for logits, pooled in parts]
        )


class InceptionExtractor:
    """FID's InceptionV3, with the outputs that the ADM evaluator takes.

    pool_3 (2048) for FID, precision and recall; the first 7 channels of mixed_6/conv, 17 x 17 x 7 = 2023, for sFID; the
    softmax of the logits without their bias for the Inception Score.
    """

    name = "inception"
    size, classes, is_judge = 2048, 1008, False

    def __init__(self, weights: Path) -> None:
        state = read_weights(weights)
        self.digest = weights_digest(state)
        self._device = choose_device("auto")
        self._network = _build_inception(state, weights).to(self._device)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        spatial: list[Tensor] = []
        parts = []

        def keep(_name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            spatial.append(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1))  # TensorFlow's order, NHWC

        with exact_arithmetic(self._device), watched(self._network, ["Mixed_6d.branch1x1"], keep):
            for x in batches(images):
                pooled, logits = self._network(x.to(self._device))
                found = (pooled, spatial.pop(), logits.softmax(dim=1))
                parts.append(Features(*(tensor.cpu().numpy() for tensor in found)))
        return Features.join(parts)


def batches(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    """uint8 (N, H, W, 3) as tensors (B, 3, H, W)."""
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH].transpose(0, 3, 1, 2)))


def weights_digest(state: dict[str, Tensor]) -> str:
    """Twelve hexadecimal digits over every name and every float32 byte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a local file, without running anything that is pickled in it."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file. Pass the InceptionV3 weights that torch-fidelity publishes "
            f"({INCEPTION_LAYOUT}-*.pth)."
        )
    return read_tensors(path)


def _build_inception(state: dict[str, Tensor], path: Path) -> Any:
    """torch-fidelity's network with this state. Its own loader unpickles anything, so it gets a clean copy to read."""
    try:
        kind: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingLibraryError(
            f"--inception-weights needs {error.name or 'torch_fidelity'}, which is not installed. Run: pip install "
            "torch-fidelity"
        ) from error
    except RuntimeError as error:  # a torchvision that was built for another torch
        raise MissingLibraryError(
            f"--inception-weights needs torch-fidelity, which cannot be imported here ({' '.join(str(error).split())})."
            " Install the torchvision that fits your torch."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "inception.pth"
        torch.save(dict(state), clean)
        try:
            return kind("tqdit", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(clean))
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: {len(state)} tensors that are not those of FID's InceptionV3 "
                f"({' '.join(str(error).split())[:160]}...). Pass torch-fidelity's {INCEPTION_LAYOUT}-*.pth."
            ) from error
