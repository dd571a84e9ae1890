"""What a network call is to every stage: named ports in, one prediction out. Torch-free.

No stage asks for a family. What a stage needs to know about a network is here, in `sampling.SamplingSpec` (the chain
that the network was trained for) and in `models.products` (its products).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError

PortKind = Literal["state", "time", "request"]
PortType = Literal["float32", "int64", "bool"]
Null = float | Literal["own"] | None
MOST_ELEMENTS = 2**28  # of one row of a port
NEGATIVE = "negative."  # begins the name of what a request brings for the unconditional row
NUMBERS = {"float32": np.floating, "int64": np.integer, "bool": np.bool_}


@dataclass(frozen=True)
class Port:
    """One input of a network call.

    kind: `state` is x_t, `time` is the timestep of each row in the network's own unit, `request` is what a user asks
    for (a class, an embedded text). shape: the first dimension is the rows, None.
    """

    name: str  # of the network's own argument
    kind: PortKind
    dtype: PortType
    shape: tuple[int | None, ...]
    null: Null = None  # fills the port in an unconditional row; None: as in the other row; own: a request brings it
    values: int | None = None  # of an integer port: it takes 0..values - 1, the null value among them
    listed: bool = False  # the network takes it as a list of its rows

    def __post_init__(self) -> None:
        if not self.name or not self.shape or self.shape[0] is not None or None in self.shape[1:]:
            raise ValueError(f"port '{self.name}' with shape {self.shape}; expected rows (None), then fixed sizes")
        if not all(size > 0 for size in self.row_shape) or math.prod(self.row_shape) > MOST_ELEMENTS:
            raise ValueError(
                f"port '{self.name}' with shape {self.shape}; expected 1 to {MOST_ELEMENTS} elements a row"
            )

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return tuple(size for size in self.shape if size is not None)

    @property
    def choices(self) -> int | None:
        """How many values a user can choose from; None if the port does not hold one whole number of a known range."""
        if self.values is None or self.row_shape:
            return None
        return self.values - (self.null is not None)

    def zeros(self, rows: int) -> NDArray[Any]:
        return np.zeros((rows, *self.row_shape), self.dtype)


@dataclass(frozen=True)
class Signature:
    """The ports of a network in the order of its arguments, and the shape of its prediction."""

    ports: tuple[Port, ...]
    output: tuple[int | None, ...]
    family: str  # name of the network's class, for messages

    def __post_init__(self) -> None:
        kinds = [port.kind for port in self.ports]
        if kinds.count("state") != 1 or kinds.count("time") != 1 or len(set(self.names)) != len(kinds):
            raise ValueError(f"ports {self.names} of kinds {kinds}; expected one state, one time and no name twice")
        if self.output[:1] != (None,) or not all(size and size > 0 for size in self.output[1:]):
            raise ValueError(f"output {self.output}; expected rows (null) and sizes of at least 1")

    def check_predicts_state(self) -> None:
        """Raises UsageError for a prediction that no chain can use.

        One that has more channels (axis 1) than the state begins with the state's; what the others hold is up to the
        process (a learned variance, or nothing that is used).
        """
        state, output = self.state.row_shape, self.output_shape
        if len(output) != len(state) or output[1:] != state[1:] or output[0] < state[0]:
            raise UsageError(f"prediction {output} of a state {state}; expected the same shape, or more channels.")

    @cached_property
    def state(self) -> Port:
        return next(port for port in self.ports if port.kind == "state")

    @cached_property
    def time(self) -> Port:
        return next(port for port in self.ports if port.kind == "time")

    @cached_property
    def requests(self) -> tuple[Port, ...]:
        return tuple(port for port in self.ports if port.kind == "request")

    @cached_property
    def request_values(self) -> dict[str, Port]:
        """What a request holds: each request port, and `negative.PORT` if the unconditional row has its own value."""
        own = {f"{NEGATIVE}{port.name}": port for port in self.requests if port.null == "own"}
        return {port.name: port for port in self.requests} | own

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(port.name for port in self.ports)

    @property
    def channels(self) -> int:
        """Of the state (its axis 1)."""
        return self.state.row_shape[0]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one row of the prediction."""
        return tuple(size for size in self.output if size is not None)

    @property
    def label(self) -> Port | None:
        """The request port if that is the only one and holds a class; None otherwise."""
        if len(self.requests) != 1 or self.requests[0].choices is None:
            return None
        return self.requests[0]

    def zeros(self, rows: int) -> dict[str, NDArray[Any]]:
        """An example of a call."""
        return {port.name: port.zeros(rows) for port in self.ports}


Requests = Any  # see `check_requests`


def check_requests(signature: Signature, requests: Requests) -> tuple[int, dict[str, NDArray[Any]]]:
    """(number of images, request port -> array (images, ...)) of what a user asks for.

    requests: the number of images of a network without request ports; the values of the only request port; or a
    mapping from each request port's name to its values. Raises UsageError for what the network does not take.
    """
    ports = signature.request_values
    if not ports:
        if isinstance(requests, bool) or not isinstance(requests, int) or requests < 1:
            raise UsageError(
                f"{signature.family} is unconditional: expected the number of images, at least 1, found {requests!r}."
            )
        return requests, {}
    if not isinstance(requests, dict):
        if len(ports) > 1:
            raise UsageError(
                f"{signature.family} takes {_names(ports)}. Pass a dict with an array for each, such as "
                "read_requests makes of a file, and encode of prompts if the engine has text encoders."
            )
        requests = dict.fromkeys(ports, requests)
    if set(requests) != set(ports):
        found = ", ".join(map(repr, list(requests)[:8]))
        raise UsageError(f"found {len(requests)} requests, {found}; {signature.family} takes {_names(ports)}.")
    arrays = {name: check_values(name, port, requests[name]) for name, port in ports.items()}
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1:
        raise UsageError(f"the arrays of {_names(ports)} have different lengths {sorted(counts)}. Pass one row each.")
    return counts.pop(), arrays


def check_request(signature: Signature, request: Any) -> dict[str, NDArray[Any]]:
    """Request port -> its row, of what a user asks for of one image: what `check_requests` takes, without the images.

    None for a network without request ports.
    """
    if not signature.requests:
        if request is not None:
            raise UsageError(f"{signature.family} is unconditional: expected None for a request, found {request!r}.")
        return {}
    if isinstance(request, dict):
        rows: Requests = {name: [value] for name, value in request.items()}
    else:
        rows = [request]
    return {name: values[0] for name, values in check_requests(signature, rows)[1].items()}


def check_call(signature: Signature, values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The inputs of one network call as contiguous arrays of the ports' types.

    values: port -> array (rows, ...), the same number of rows for each. Raises UsageError for what the network does not
    take.
    """
    if set(values) != set(signature.names):
        raise UsageError(f"found {', '.join(map(repr, values))}; {signature.family} takes {_names(signature.names)}.")
    arrays = {port.name: check_values(port.name, port, values[port.name]) for port in signature.ports}
    if len({len(array) for array in arrays.values()}) != 1:
        rows = ", ".join(f"'{name}' has {len(array)}" for name, array in arrays.items())
        raise UsageError(f"the inputs of a call have different numbers of rows: {rows}. Pass as many of each.")
    return arrays


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def check_values(name: str, port: Port, values: Any) -> NDArray[Any]:
    """The values of one port as a contiguous array of its type. Raises UsageError, with `name`, for others."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # such as a tensor that NumPy has no type for
        array = np.asarray(None)
    wanted = NUMBERS[port.dtype]
    if array.ndim == 0 or not len(array) or array.shape[1:] != port.row_shape or not np.issubdtype(array.dtype, wanted):
        rows = "N" if not port.row_shape else f"N, {', '.join(map(str, port.row_shape))}"
        raise UsageError(
            f"'{name}' is {array.dtype}{list(array.shape)}, expected a non-empty array of {wanted.__name__} "
            f"numbers ({rows})."
        )
    if port.values is not None and (bad := array[(array < 0) | (array >= port.values)]).size:
        known = f"0..{port.values - 1}" if port.null is None else f"0..{port.values - 2} (and {port.values - 1}: none)"
        raise UsageError(f"'{name}' {bad.flat[0]} is out of range; this model knows {known}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        array = np.ascontiguousarray(array, port.dtype)
    if not np.isfinite(array).all():
        raise UsageError(f"'{name}' holds NaN or infinite values in {port.dtype}, expected finite numbers.")
    return array
