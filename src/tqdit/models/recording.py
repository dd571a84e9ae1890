"""Recorded calls of a network and the facts of the loop around them, as a value and as a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor, nn

from tqdit import safetensors_file
from tqdit.errors import FileFormatError, OutputError, UsageError, first_line
from tqdit.files import SAFETENSORS, reading, whole_file
from tqdit.interface import RECORDING_KEY, REQUEST, Interface, RecordingHeader
from tqdit.models.arguments import Constant, settings_of
from tqdit.models.calls import Roles, parameters_of
from tqdit.models.known import values_read
from tqdit.models.loaded import arguments_of
from tqdit.ports import NEGATIVE, Port, Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Unsampled
from tqdit.sampling.schedule import SamplingSpec

FORMAT_VERSION = 2  # since recordings tell how states were noised
STATES = "states"
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Recording:
    """Chains that a pipeline ran, all with one schedule; or calls of a network alone.

    states float32 (images, T, ...), indexed by the step (T-1 is the first). requests: as `Signature.request_values`,
    (images, ...). Of a network alone: T is 1, a row of a call counts as an image, and requests hold the timestep too.
    """

    interface: Interface
    states: NDArray[np.float32]
    requests: dict[str, Array]

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        facts = self.interface
        return f"Recording(requests={len(self)}, family={facts.signature.family!r}, sampling={str(facts.sampling)!r})"

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all, for `load`."""
        requests = {f"{REQUEST}{name}": array for name, array in self.requests.items()}
        arrays = {STATES: self.states, **requests, **self.interface.arrays}
        text = msgspec.json.encode(RecordingHeader(FORMAT_VERSION, self.interface.entry), order="sorted").decode()
        with whole_file(Path(path)) as temporary:
            try:
                save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, {RECORDING_KEY: text})
            except SafetensorError as error:  # a full disk, told in its own way
                raise OutputError(f"{path}: cannot be written ({first_line(error)}). Choose another place.") from error
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what `save` wrote. Raises FileFormatError for any other file."""
        again = "Record the pipeline again."
        with reading(Path(path), SAFETENSORS, again, ValueError):
            metadata, tensors = safetensors_file.read(Path(path))
        if RECORDING_KEY not in metadata or STATES not in tensors:
            raise FileFormatError(
                f"{path}: not recorded calls (it has no '{RECORDING_KEY}' metadata). Pass what tqdit.record recorded."
            )
        try:
            header = msgspec.json.decode(metadata[RECORDING_KEY], type=RecordingHeader)
        except (msgspec.MsgspecError, UsageError, RecursionError) as error:
            raise FileFormatError(f"{path}: damaged, or of another version ({error}). {again}") from error
        if header.format_version != FORMAT_VERSION:
            raise FileFormatError(f"{path}: format {header.format_version}, expected {FORMAT_VERSION}. {again}")
        requests = {name.removeprefix(REQUEST): array for name, array in tensors.items() if name.startswith(REQUEST)}
        found = cls(Interface.of(header.interface, tensors), tensors[STATES], requests)
        found.check(str(path))
        return found

    @property
    def _arrays(self) -> dict[str, Array]:
        return {STATES: self.states, **self.requests}

    def check(self, where: str) -> None:
        """Raises FileFormatError if the arrays do not fit the interface, or hold NaN."""
        signature = self.interface.signature
        self.interface.check(where)
        shapes = {name: port.row_shape for name, port in signature.request_values.items()}
        if isinstance(self.interface.sampling.process, Unsampled):
            shapes[signature.time.name] = signature.time.row_shape
        found = {name: array.shape[1:] for name, array in self.requests.items()}
        states = (self.interface.sampling.steps, *signature.state.row_shape)
        counts = {len(self.states), *(len(array) for array in self.requests.values())}
        if found != shapes or self.states.shape[1:] != states or len(counts) != 1 or not len(self.states):
            raise FileFormatError(f"{where}: its requests {found} and states do not fit its ports. Record again.")
        types = {STATES: "float32", **{name: port.dtype for name, port in signature.request_values.items()}}
        wrong = [(name, array) for name, array in self._arrays.items() if array.dtype != types.get(name, "float32")]
        if wrong:
            name, array = wrong[0]
            raise FileFormatError(
                f"{where}: '{name}' is {array.dtype}, expected {types.get(name, 'float32')}. Record again."
            )
        if not all(np.isfinite(array).all() for array in self._arrays.values()):
            raise FileFormatError(f"{where}: holds NaN or infinite values. Record again.")

    @cached_property
    def sha256(self) -> str:
        """Over states and requests."""
        digest = hashlib.sha256()
        for name, array in sorted({"": self.states, **self.requests}.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def as_recording(calls: Any) -> Recording:
    """A recording, what `tqdit.record` gave, or the path of a file. Raises UsageError for anything else."""
    if isinstance(calls, str | Path):
        return Recording.load(calls)
    if getattr(calls, "is_listening", False):
        raise UsageError("rows are calls that are still being recorded. Leave the `with tqdit.record` block first.")
    found = calls if isinstance(calls, Recording) else getattr(calls, "recording", lambda: None)()
    if not isinstance(found, Recording):
        raise UsageError(
            f"rows are a {type(calls).__name__}, expected what tqdit.record gave, or the path of its file."
        )
    return found


def make_recording(
    network: nn.Module, roles: Roles, output: tuple[int, ...], sampled: tuple[SamplingSpec, Guidance | None],
    constants: Mapping[str, Constant], states: Array, requests: dict[str, Array],
) -> Recording:  # fmt: skip
    """The recording, once requests whose values the network's Python reads have become constants."""
    signature = _signature(network, roles, states, requests, output)
    example = {name: torch.from_numpy(array) for name, array in signature.zeros(2).items()}
    alike = {
        port.name: torch.from_numpy(requests[port.name][:1])[0]
        for port in signature.requests
        if _is_alike(port, requests)
    }
    read = values_read(network, arguments_of(signature, constants, example), alike, roles.state)
    plain = {
        name: value.numpy() if isinstance(value, Tensor) else value for name, value in {**constants, **read}.items()
    }
    ports = tuple(port for port in signature.ports if port.name not in read)
    interface = Interface(replace(signature, ports=ports), *sampled, plain, settings_of(network), tuple(read))
    return Recording(interface, states, {name: array for name, array in requests.items() if name not in read})


def _signature(
    network: nn.Module, roles: Roles, states: Array, requests: Mapping[str, Array], output: tuple[int, ...]
) -> Signature:
    """states (rows, T, ...), requests: values of every other port, maybe of the time."""
    times = requests[roles.time].shape[1:] if roles.time in requests else ()
    ports = [
        Port(roles.state, "state", "float32", (None, *states.shape[2:]), listed=roles.state in roles.lists),
        Port(roles.time, "time", "float32", (None, *times)),
    ]
    for name, values in requests.items():
        if name not in (roles.state, roles.time) and not name.startswith(NEGATIVE):
            dtype: Any = str(values.dtype)
            null: Any = "own" if f"{NEGATIVE}{name}" in requests else None
            shape = (None, *values.shape[1:])
            ports.append(Port(name, "request", dtype, shape, null=null, listed=name in roles.lists))
    order = {name: index for index, name in enumerate(parameters_of(network))}
    ports.sort(key=lambda port: order.get(port.name.partition(".")[0], 0))
    return Signature(tuple(ports), (None, *output), type(network).__name__)


def _is_alike(port: Port, requests: Mapping[str, Array]) -> bool:
    """Whether it has one value in every row."""
    values = requests[port.name]
    return port.null is None and "." not in port.name and bool((values == values[0]).all())
