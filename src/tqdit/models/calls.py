"""The calls of a network while it is recorded: which arguments have rows, and which are alike in every call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tqdit.errors import UsageError
from tqdit.models.arguments import Constant, flatten
from tqdit.models.products import prediction_of

DROP_IN_ONLY = "Only the drop-in runs such a pipeline: record its network alone, tqdit.record(pipeline.transformer)."


@dataclass
class Call:
    """One network call: tensors, other arguments, and the prediction."""

    tensors: dict[str, Tensor]
    constants: dict[str, Constant]
    output: Tensor
    lists: frozenset[str]  # tensors that are lists of their rows


@dataclass(frozen=True)
class Roles:
    """What some arguments are. lists: those that are lists of their rows."""

    state: str
    time: str
    lists: frozenset[str]


def parameters_of(network: nn.Module) -> list[str]:
    """The names of its arguments, in their order."""
    return [name for name in inspect.signature(network.forward).parameters if name != "self"]


def listen(network: nn.Module, hear: Callable[[Call], object]) -> RemovableHandle:
    """Call `hear` with every call of the network, until the handle is removed."""
    parameters = inspect.signature(network.forward).parameters

    def called(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = dict(zip(parameters, args, strict=False)) | kwargs
        lists = {name: torch.stack(value) for name, value in named.items() if _is_list_of_rows(value, named)}
        tensors, constants = flatten({k: v for k, v in (named | lists).items() if k != "return_dict"})
        nothing = {name: value for name, value in named.items() if value is None or value in ({}, [], ())}
        constants |= {n: v for n, v in nothing.items() if n in parameters and parameters[n].default != v}
        hear(Call(tensors, constants, prediction_of(output).detach(), frozenset(lists)))

    return network.register_forward_hook(called, with_kwargs=True)


def find_time(arguments: Mapping[str, Any]) -> str:
    """The argument that is the timestep. Raises UsageError if there is none."""
    usual = ("timestep", "t", "timesteps", *(name for name in arguments if "time" in name))
    for name in usual:
        if isinstance(arguments.get(name), Tensor):
            return name
    raise UsageError(f"the transformer has no timestep among {', '.join(arguments)}.")


def _is_list_of_rows(value: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether an argument is a list with a tensor for each row, all of one shape."""
    if not isinstance(value, list) or not value or not all(isinstance(row, Tensor) and row.ndim for row in value):
        return False
    rows = arguments[find_time(arguments)].numel()
    return len(value) == rows and {row.shape for row in value} == {value[0].shape} and len(value[0]) != rows


def join(calls: Sequence[Call], roles: Roles) -> dict[str, Tensor]:
    """The rows of several calls; arguments without rows become constants of their call."""
    parts: dict[str, list[Tensor]] = {}
    for call in calls:
        rows = len(call.tensors[roles.state])
        for name in list(call.tensors):
            tensor = call.tensors[name]
            if name == roles.time:
                tensor = _timesteps(name, tensor, rows)
            if tensor.ndim == 0 or len(tensor) != rows:
                call.constants[name] = call.tensors.pop(name).cpu()
            else:
                parts.setdefault(name, []).append(tensor)
    if any(len(tensors) != len(calls) for tensors in parts.values()):
        raise UsageError("calls take different arguments, expected the same in each. Record one kind at a time.")
    try:
        return {name: torch.cat(tensors).cpu() for name, tensors in parts.items()}
    except RuntimeError as error:
        raise UsageError(f"calls have different shapes ({error}). Pad the prompts alike.") from error


def _timesteps(name: str, tensor: Tensor, rows: int) -> Tensor:
    """float32 (rows, ...): one for each row, or several, such as one for each frame."""
    tensor = tensor.float()
    if tensor.numel() in (1, rows):
        return tensor.reshape(-1).expand(rows)
    if tensor.ndim < 2 or len(tensor) != rows:
        raise UsageError(f"'{name}' is {list(tensor.shape)} for {rows} rows, expected timesteps for each row.")
    return tensor


def check_alike(a: Mapping[str, Constant], b: Mapping[str, Constant]) -> None:
    """Refuse arguments without rows that change from call to call."""
    for name in [*a, *b]:
        if name not in a or name not in b or not _same(a[name], b[name]):
            raise UsageError(
                f"argument '{name}' has no rows and changes from call to call; an engine has one value of it. Record "
                "one kind of calls at a time."
            )


def _same(a: Constant, b: Constant) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)
