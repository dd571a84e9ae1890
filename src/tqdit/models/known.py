"""Values that a network's Python reads: a caption's length in its mask, zeros that stand for no image.

No graph can follow such code. An argument that is alike in all recorded rows becomes part of the network instead: what
depends on it and on no input is computed while the network is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tqdit.errors import UsageError
from tqdit.models.products import stand_in

MAKERS = (torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor)


class _KnownValues(TorchFunctionMode):
    """While tensors without memory flow: what follows from known values is computed at once and stays known."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.__getitem__:
            args = (args[0], _plain_index(args[1]))
        values = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor | torch.SymInt)]
        if all(map(_is_known, values)) if values else function in MAKERS:
            return _compute(function, args, kwargs)
        return function(*args, **kwargs)


def _plain_index(index: Any) -> Any:
    """An index whose known values are plain: places for a bool mask, numbers for the bounds of a slice."""
    if isinstance(index, tuple):
        return tuple(map(_plain_index, index))
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        return slice(*(int(_compute(Tensor.item, (each,), {})) if _is_known(each) else each for each in bounds))
    if _is_known(index) and index.dtype == torch.bool:
        places = _compute(torch.nonzero, (index,), {"as_tuple": True})
        return places if len(places) > 1 else places[0]
    return index


def _compute(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        return function(*args, **kwargs)


def _is_known(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor | nn.Parameter)


class _Fixed:
    """Hooks that give a network some of its arguments."""

    def __init__(self, values: Mapping[str, Tensor], state: str) -> None:
        self._values, self._state = values, state
        self._modes: list[_KnownValues] = []

    def enter(self, _network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows, mode = len(kwargs[self._state]), _KnownValues()
        mode.__enter__()
        self._modes.append(mode)
        return args, kwargs | {name: value.expand(rows, *value.shape) for name, value in self._values.items()}

    def leave(self, _network: nn.Module, _args: Any, _output: Any) -> None:
        self._modes.pop().__exit__(None, None, None)


def fix_arguments(network: nn.Module, values: Mapping[str, Tensor], state: str) -> None:
    """Make arguments part of the network, in place. values: one row of each; state: an argument that tells the rows."""
    if values:
        fixed = _Fixed(values, state)
        network.register_forward_pre_hook(fixed.enter, with_kwargs=True)
        network.register_forward_hook(fixed.leave, always_call=True)


def values_read(
    network: nn.Module, arguments: Mapping[str, Any], alike: Mapping[str, Tensor], state: str
) -> dict[str, Tensor]:
    """Those of `alike` whose values the network's Python reads: as few as possible.

    arguments: of a call. alike: one row of those arguments that have the same value in every row. Raises UsageError if
    values of others are read.
    """
    if (problem := _read(network, arguments, {}, state)) is None:
        return {}
    fixed = dict(alike)
    if _read(network, arguments, fixed, state) is not None:
        raise UsageError(
            f"the code of {type(network).__name__} reads values of its inputs ({problem}), and an engine has one value "
            "of what is read. Record calls in which masks and the like are the same in every row."
        )
    for name in alike:
        fewer = {other: value for other, value in fixed.items() if other != name}
        if _read(network, arguments, fewer, state) is None:
            fixed = fewer
    return fixed


def _read(network: nn.Module, arguments: Mapping[str, Any], fixed: Mapping[str, Tensor], state: str) -> str | None:
    """What is read of the arguments that are not fixed; None if nothing is."""
    network, fake = stand_in(network), FakeTensorMode(allow_non_fake_inputs=True)
    fix_arguments(network, fixed, state)
    free = {name: value for name, value in arguments.items() if name not in fixed}
    dtype = next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), torch.float32)

    def take(tensor: Tensor) -> FakeTensor:
        return fake.from_tensor(tensor.to(dtype) if tensor.is_floating_point() else tensor)

    try:
        with torch.no_grad(), fake:
            network(**tree_map_only(Tensor, take, free))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return str(error)
    return None
