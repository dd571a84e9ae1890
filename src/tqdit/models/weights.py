"""Weights that stay in their file: a network for exports, whose large parameters are read one at a time when needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tqdit.errors import CheckpointError, TqditError
from tqdit.models.state import FLOAT_TYPES, find_shards, is_finite, read_tensor

LARGE = 1 << 16  # elements; smaller parameters are loaded


@dataclass(frozen=True, eq=False)
class Weights:
    """The values of a network's parameters.

    files: for a parameter that has a shape and an address in memory but no content, the file and the name of its
    tensor, by that address. Views of the parameter are read as views of the tensor.
    """

    files: Mapping[int, tuple[Path, str]] = field(default_factory=dict)

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor's values lie in a file."""
        return tensor.untyped_storage().data_ptr() in self.files

    def read(self, tensor: Tensor) -> Tensor:
        """A parameter or a view of one, float32, without gradients. What was read goes when the caller lets it go.

        Raises CheckpointError if its values are no numbers.
        """
        tensor = tensor.detach()
        if tensor not in self:
            return tensor
        path, name = self.files[tensor.untyped_storage().data_ptr()]
        whole = read_tensor(path, name).to(torch.float32).contiguous()
        if not is_finite(whole):
            raise CheckpointError(f"{path}: '{name}' holds NaN or infinite values. Get the directory again.")
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


IN_MEMORY = Weights()


def open_network(kind: Any, weights: Path, settings: Mapping[str, Any]) -> tuple[nn.Module, Weights] | None:
    """A network of diffusers' class `kind` for the tensors of a safetensors file or the index of one.

    None if only diffusers itself can load it: other files, other names or shapes, types that are no floats. Large
    parameters take address space and no memory, so the network can be traced, but not run.
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
    values: dict[str, Tensor] = {}
    files: dict[int, tuple[Path, str]] = {}
    for name, path in shards.items():
        tensor = read_tensor(path, name)
        if tensor.shape != expected[name].shape or tensor.dtype not in FLOAT_TYPES:
            return None
        if tensor.numel() < LARGE:
            values[name] = tensor.to(torch.float32, copy=True)
        else:
            values[name] = torch.empty(tensor.shape)  # memory that is never touched takes no place
            files[values[name].untyped_storage().data_ptr()] = path, name
    network.load_state_dict(values, assign=True)
    return network.eval().requires_grad_(False), Weights(files)
