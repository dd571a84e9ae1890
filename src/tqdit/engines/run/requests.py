"""Request values of several prompts in one file, for networks that take more than a class (docs/sampling-many.md)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit import safetensors_file
from tqdit.card import GraphCard
from tqdit.errors import FileFormatError, TqditWarning, UsageError
from tqdit.files import SAFETENSORS, reading, sha256
from tqdit.interface import RECORDING_KEY, REQUEST
from tqdit.ports import Signature, check_requests
from tqdit.text import TextEncoder


@dataclass(frozen=True)
class PromptSource:
    """Which prompts images show, in turn: texts that the engine encodes, or a file of their request values."""

    count: int
    texts: tuple[str, ...] = ()
    sha256: str | None = None  # of the file
    file: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return "; ".join(self.texts) or f"{self.count} of {str(self.sha256)[:8]}"  # the file's name may stay


@dataclass(frozen=True, eq=False)
class Prompts:
    """What is asked for of each prompt. values: as `Signature.request_values`, (prompts, ...)."""

    source: PromptSource
    values: Mapping[str, NDArray[Any]]

    def take(self, numbers: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The request values of images that show these prompts."""
        return {name: array[numbers] for name, array in self.values.items()}


def open_texts(folder: Path, card: GraphCard) -> TextEncoder:
    """The text encoders of a bundle. Raises UsageError if it has none."""
    if card.signature.label is not None:
        raise UsageError(
            f"{folder}: this engine shows classes and takes no prompts. Leave them out; tqdit-sample takes --classes."
        )
    if card.text is None:
        raise UsageError(
            f"{folder}: this engine has no text encoders. Pass --embeddings FILE, or export again with --text."
        )
    return TextEncoder(folder, card.text)


def encode(folder: Path, card: GraphCard, texts: Sequence[str]) -> Prompts:
    """The request values of prompts, by a bundle's own text encoders. Warns (`TqditWarning`) of words that they do not
    know."""
    encoder = open_texts(folder, card)
    _, values = check_requests(card.signature, encoder(texts))
    for text in texts:
        if words := encoder.unknown_words(text):
            named = ", ".join(f"'{word[:20]}'" for word in words[:8])
            warnings.warn(f"the text encoders do not know {named} of the prompt {text[:60]!r}. Use other words.",
                          TqditWarning, stacklevel=2)  # fmt: skip
    return Prompts(PromptSource(len(texts), tuple(texts)), values)


def read_embeddings(path: Path, signature: Signature) -> Prompts:
    """The request values in a safetensors file: one tensor (prompts, ...) for each, or calls that `tqdit.record` saved.

    Raises FileFormatError, naming the file, for values that the network does not take, and UsageError for a network
    that takes none.
    """
    if not signature.requests:
        raise UsageError(f"{signature.family} is unconditional and takes no --embeddings. Leave it out.")
    with reading(path, SAFETENSORS, "Write one tensor for each request value.", ValueError):
        metadata, arrays = safetensors_file.read(path)
    if RECORDING_KEY in metadata:
        arrays = {name.removeprefix(REQUEST): each for name, each in arrays.items() if name.startswith(REQUEST)}
    try:
        count, values = check_requests(signature, arrays)
    except UsageError as error:
        raise FileFormatError(f"{path}: {error}") from error
    return Prompts(PromptSource(count, sha256=sha256(path), file=str(path)), values)
