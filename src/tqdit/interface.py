"""How a network is called and sampled: what a recording learned of a pipeline and an export needs. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tqdit.card import Latents
from tqdit.errors import FileFormatError, UsageError
from tqdit.ports import Signature, check_requests
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.schedule import SamplingSpec

CONSTANT = "constant."  # begins the names of tensors in a file
EXAMPLE = "recorded_prompt."  # begins the names of what the network took of recorded prompts
RECORDING_KEY = "tqdit_calls"  # the metadata of a file of recorded calls
REQUEST = "request."  # begins the names of its request values


class TextEntry(msgspec.Struct):
    """Examples of text in the metadata of a file; their values lie beside."""

    prompts: list[str]
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class TextExamples:
    """Some recorded prompts, and what the network took of each: by these, text encoders are proved.

    values: as `Signature.request_values`, (prompts, ...). settings: other arguments of the pipeline's `encode_prompt`.
    """

    prompts: tuple[str, ...]
    settings: Mapping[str, Any]
    values: Mapping[str, NDArray[Any]]


class InterfaceEntry(msgspec.Struct):
    """An interface in the metadata of a file; constants that are tensors lie beside."""

    signature: Signature
    sampling: SamplingSpec
    guidance: Guidance | None
    constants: dict[str, Any]
    config: dict[str, Any]
    alike: list[str] = []
    latents: Latents | None = None
    text: TextEntry | None = None


class RecordingHeader(msgspec.Struct):
    """The metadata of a file of recorded calls."""

    format_version: int
    interface: InterfaceEntry


@dataclass(frozen=True, eq=False)
class Interface:
    """The ports of a network, the chain that it was recorded in, and arguments that are alike in every call.

    constants: by dotted name (`models.arguments`): arrays, or what JSON can hold. alike: those that have rows, all the
    same: one row. config: the network's settings, which pipelines read. latents: of states that a VAE decoded.
    text: of a pipeline that was called with prompts.
    """

    signature: Signature
    sampling: SamplingSpec
    guidance: Guidance | None
    constants: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    alike: tuple[str, ...] = ()
    latents: Latents | None = None
    text: TextExamples | None = None

    def check(self, where: str) -> None:
        """Raises FileFormatError for parts of a file that do not belong together."""
        unknown = [name for name in self.alike if not isinstance(self.constants.get(name), np.ndarray)]
        if unknown:
            raise FileFormatError(f"{where}: has no values of the argument '{unknown[0]}'. Record again.")
        if self.text is None:
            return
        try:
            count = check_requests(self.signature, dict(self.text.values))[0]
        except UsageError as error:
            raise FileFormatError(f"{where}: of its recorded prompts, {error} Record again.") from error
        if count != len(self.text.prompts):
            raise FileFormatError(f"{where}: {len(self.text.prompts)} prompts with values of {count}. Record again.")

    @property
    def entry(self) -> InterfaceEntry:
        values = {name: value for name, value in self.constants.items() if not isinstance(value, np.ndarray)}
        config, alike = dict(self.config), list(self.alike)
        text = None if self.text is None else TextEntry(list(self.text.prompts), dict(self.text.settings))
        return InterfaceEntry(self.signature, self.sampling, self.guidance, values, config, alike, self.latents, text)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The constants that are tensors, and the values of prompts, under names for a file."""
        arrays = {f"{CONSTANT}{name}": value for name, value in self.constants.items() if isinstance(value, np.ndarray)}
        if self.text is not None:
            arrays |= {f"{EXAMPLE}{name}": value for name, value in self.text.values.items()}
        return {name: np.ascontiguousarray(value) for name, value in arrays.items()}

    @classmethod
    def of(cls, entry: InterfaceEntry, arrays: Mapping[str, NDArray[Any]]) -> Interface:
        """From the metadata of a file and all its tensors."""
        found = {name.removeprefix(CONSTANT): array for name, array in arrays.items() if name.startswith(CONSTANT)}
        constants = {**entry.constants, **found}
        alike = tuple(entry.alike)
        values = {name.removeprefix(EXAMPLE): array for name, array in arrays.items() if name.startswith(EXAMPLE)}
        text = None if entry.text is None else TextExamples(tuple(entry.text.prompts), entry.text.settings, values)
        return cls(entry.signature, entry.sampling, entry.guidance, constants, entry.config, alike, entry.latents, text)
