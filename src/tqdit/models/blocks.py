"""The blocks of a transformer, and what they add to the tokens: the residual of a call (`sampling.forecasts`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tqdit.errors import UsageError


def block_names(network: nn.Module) -> list[str]:
    """The members of the outermost lists of modules: a transformer's blocks."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return [f"{name}.{member}" for name in outermost for member, _ in network.get_submodule(name).named_children()]


@dataclass
class Stack:
    """What went into the blocks and came out of the last one in a call of the network."""

    entries: list[Tensor] = field(default_factory=list)  # the tokens before each block, in the order of calls
    output: Any = None  # of the block that was called last: tokens, or a tuple with those of several streams

    def residual(self) -> Tensor:
        """The tokens after the last block less those before the first block that takes tokens of this shape.

        Raises UsageError for a network without such blocks.
        """
        after = self.after
        if after is None:
            raise UsageError(
                "forecasts extrapolate what a list of blocks adds to the tokens, and this network has none whose last "
                "block returns tokens of the shape that a block takes. Leave the forecasts out."
            )
        return after - self.before(after)

    @property
    def after(self) -> Tensor | None:
        """The stream of the last block's result that a block took; None: there is none.

        Of several of one shape the last one, since blocks of two streams return (text, image).
        """
        outputs = [self.output] if isinstance(self.output, Tensor) else [*(self.output or ())]
        shapes = [entry.shape for entry in self.entries]
        found = [each for each in outputs if isinstance(each, Tensor) and each.shape in shapes]
        return found[-1] if found else None

    def before(self, after: Tensor) -> Tensor:
        """The tokens that the blocks began with."""
        return next(entry for entry in self.entries if entry.shape == after.shape)


@contextmanager
def listen_to_blocks(network: nn.Module, residual: Tensor | None = None) -> Iterator[Stack]:
    """Fill the stack that this yields in the one call of the network inside.

    residual (rows, ...): what the blocks are taken to add, whatever they compute.
    """
    stack = Stack()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.ndim > 2]
        named = kwargs.get("hidden_states")
        stack.entries += [named] if isinstance(named, Tensor) else tensors[:1]

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        stack.output = output
        after = stack.after
        if residual is None or after is None or after.shape != residual.shape:
            return None
        forecast = stack.before(after) + residual
        if isinstance(output, Tensor):
            return forecast
        return tuple(forecast if each is after else each for each in output)

    with ExitStack() as hooks:
        for name in block_names(network):
            block = network.get_submodule(name)
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        yield stack
