"""Arguments of a network by dotted names: 'added_cond_kwargs.resolution' is an entry of a dict, 'freqs.0' of a tuple."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Constant = Any  # a tensor, or what JSON can hold


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Constant]]:
    """(tensors, other values) by dotted name; None and empty containers are left out.

    Numbers keep their kind and take the widest type that ports have: float32, int64, bool.
    """
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Constant] = {}
    for name, value in arguments.items():
        full = f"{prefix}{name}"
        if value is None or (isinstance(value, dict | list | tuple) and not value):
            continue
        if isinstance(value, Tensor):
            tensors[full] = _plain(value)
        elif isinstance(value, dict | list | tuple) and _holds_tensor(value):
            entries = value if isinstance(value, dict) else {str(index): each for index, each in enumerate(value)}
            inner = flatten(entries, f"{full}.")
            tensors |= inner[0]
            constants |= inner[1]
        else:
            constants[full] = value
    return tensors, constants


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments from dotted names: the opposite of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in named.items():
        *parents, leaf = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return {name: _sequence(value) for name, value in tree.items()}


def _sequence(value: Any) -> Any:
    """Dicts whose keys count from 0 are tuples."""
    if not isinstance(value, dict):
        return value
    entries = {name: _sequence(each) for name, each in value.items()}
    if entries and all(name == str(index) for index, name in enumerate(entries)):
        return tuple(entries.values())
    return entries


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(_holds_tensor(each) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_floating_point():
        return tensor.to(torch.float32, copy=True)
    if tensor.dtype == torch.bool:
        return tensor.clone()
    if tensor.is_complex():
        return tensor.clone()
    return tensor.to(torch.int64, copy=True)
