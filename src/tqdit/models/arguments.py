"""Arguments of a network by dotted names: 'added_cond_kwargs.size' is an entry of a dict, 'freqs.0' of a tuple."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


def digest(value: Constant) -> str:
    """Tells arguments apart: the SHA-256 of a tensor's values and shape, or JSON."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        plain = np.ascontiguousarray(value if np.iscomplexobj(value) else value.astype(np.float64))
        return hashlib.sha256(f"{plain.shape}".encode() + plain.tobytes()).hexdigest()
    return json.dumps(value, sort_keys=True, default=str)


def settings_of(network: nn.Module) -> dict[str, Any]:
    """A network's configuration and its plain attributes, as JSON can hold them; without a configuration, nothing.

    Pipelines read both: `transformer.config.patch_size` and `transformer.inner_dim`.
    """
    config = dict(getattr(network, "config", None) or {})
    plain = {name: value for name, value in vars(network).items() if isinstance(value, int | float | str)}
    settings = {name: value for name, value in ((plain | config) if config else {}).items() if name[0] != "_"}
    settings.pop("training", None)
    held: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return held


def _sequence(value: Any) -> Any:
    """Dicts whose keys count from 0 are tuples."""
    if not isinstance(value, dict):
        return value
    entries = {name: _sequence(each) for name, each in value.items()}
    places = [str(index) for index in range(len(entries))]
    return tuple(entries[place] for place in places) if entries and entries.keys() == set(places) else entries


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
