"""Weights that stay in their file: a network whose large parameters are read one at a time when they are needed."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tqdit.errors import CheckpointError, TqditError
from tqdit.models.state import FLOAT_TYPES, find_shards, is_finite, read_tensor

LARGE = 1 << 16  # elements; smaller parameters are loaded
M_MMAP_THRESHOLD = -3  # of glibc's mallopt


@dataclass(frozen=True, eq=False)
class Weights:
    """The values of a network's parameters.

    made: parameters that have a shape and an address in memory but no content, by that address, each with a function
    that returns its values. Views of such a parameter are read as views of its values.
    """

    made: Mapping[int, tuple[Tensor, Callable[[], Tensor]]] = field(default_factory=dict)

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor's values are made when they are read."""
        return tensor.untyped_storage().data_ptr() in self.made

    def read(self, tensor: Tensor) -> Tensor:
        """A parameter or a view of one, float32, without gradients. What was read goes when the caller lets it go.

        Raises CheckpointError if its values are no numbers.
        """
        tensor = tensor.detach()
        return self._read(tensor) if tensor in self else tensor

    def _read(self, tensor: Tensor) -> Tensor:
        _, make = self.made[tensor.untyped_storage().data_ptr()]
        return make().contiguous().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, a network runs, forward and backward: each operation is lent the values of the weights it takes.

        Autograd keeps no values for the backward pass, which is lent them again.
        """
        if not self.made:
            yield
            return
        with _Lending(self):
            yield


class Changes:
    """Weights together with those that are made of them."""

    def __init__(self, weights: Weights) -> None:
        self._made = dict(weights.made)

    @property
    def weights(self) -> Weights:
        return Weights(self._made)

    def add(self, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The result of `change`, which keeps the shape, on a parameter or a view of one: now, or when it is read."""
        tensor, weights = tensor.detach(), self.weights
        if tensor not in weights:
            return change(tensor)
        return _hold(self._made, tensor.shape, lambda: change(weights.read(tensor)))


class _Lending(TorchDispatchMode):
    """Operations get values in the place of weights without content; views of such weights stay without."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not function.is_view:
            args, kwargs = tree_map_only(Tensor, self._lend, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _lend(self, tensor: Tensor) -> Tensor:
        return self._weights._read(tensor) if tensor in self._weights else tensor


def _hold(made: dict[int, tuple[Tensor, Callable[[], Tensor]]], shape: Any, make: Callable[[], Tensor]) -> Tensor:
    """A tensor without content for values that `make` returns; it is held, so nothing else gets its address."""
    # fresh pages that are never touched take no place; torch.empty may return used ones
    pages = mmap.mmap(-1, 4 * math.prod(shape))
    tensor = torch.frombuffer(pages, dtype=torch.float32).reshape(shape)
    made[tensor.untyped_storage().data_ptr()] = tensor, make
    return tensor


def _of_file(path: Path, name: str) -> Tensor:
    tensor = read_tensor(path, name).to(torch.float32)
    if not is_finite(tensor):
        raise CheckpointError(f"{path}: '{name}' holds NaN or infinite values. Get the directory again.")
    return tensor


IN_MEMORY = Weights()


def return_freed_memory() -> None:
    """Memory of a tensor goes back to the system at once, for the whole process, if the C library is glibc.

    Else weights of up to 32 MB that come and go leave gaps in the heap, which are as large as the network in the end.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def open_network(kind: Any, weights: Path, settings: Mapping[str, Any]) -> tuple[nn.Module, Weights] | None:
    """A network of diffusers' class `kind` for the tensors of a safetensors file or the index of one.

    None if only diffusers itself can load it: other files, other names or shapes, types that are no floats. Large
    parameters take address space and no memory, so the network can be traced, but runs only inside `Weights.lent`.
    """
    shards = find_shards(weights)
    if shards is None or find_spec("accelerate") is None:
        return None
    accelerate: Any = import_module("accelerate")
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            network: nn.Module = kind.from_config(settings)
    except TqditError:
        raise
    except Exception:  # of any kind: diffusers itself says what is wrong
        return None
    expected = network.state_dict()
    if expected.keys() != shards.keys():
        return None
    values, held = hold(shards)
    for name, tensor in values.items():
        if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
            return None
    network.load_state_dict(values, assign=True)
    return network.eval().requires_grad_(False), held


def hold(shards: Mapping[str, Path]) -> tuple[dict[str, Tensor], Weights]:
    """A tensor for each of safetensors files: float32, and without content if large. Raises CheckpointError for values
    that are no numbers. Tensors of types that are no floats are loaded as they are.
    """
    values: dict[str, Tensor] = {}
    made: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
    for name, path in shards.items():
        tensor = read_tensor(path, name)
        if tensor.dtype not in FLOAT_TYPES:
            values[name] = tensor
        elif tensor.numel() < LARGE:
            values[name] = _of_file(path, name).clone()  # in memory of its own
        else:
            values[name] = _hold(made, tensor.shape, partial(_of_file, path, name))
    return values, Weights(made)
