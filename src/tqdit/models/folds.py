"""Where a divisor of a product's input can go: rows of a linear layer that make one input channel each.

Found by following the channels of each linear layer through one observed call. A channel stays one through views,
transposes and pieces, through a product with anything else (act(gate) * up), and through attention (the rows of v). It
is lost in everything else, and where a tensor on its way is used twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Fold:
    """Rows start..stop of a linear layer that make an input channel each, where a divisor of that input can go.

    offset: 1 if the network adds one to what these rows compute (adaLN's 1 + scale).
    """

    module: str
    start: int
    stop: int
    offset: int = 0


def shift_and_scale(modulation: str, chunk: int, width: int) -> tuple[Fold, Fold]:
    """Where adaLN computes norm (1 + scale) + shift: chunk `chunk` of its output is shift, the next one scale."""
    start = chunk * width
    return Fold(modulation, start, start + width), Fold(modulation, start + width, start + 2 * width, offset=1)


# Functions whose output has the elements of their first tensor in the same order.
RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "to", "type_as",
            "float", "type", "dropout"}  # fmt: skip
PIECES = {"chunk": 2, "split": 2, "unbind": 1}  # and where an axis stands among their arguments, if it is there
UNSEEN = {"requires_grad_", "grad"}  # our own calls


@dataclass(frozen=True)
class _Rows:
    """A tensor whose element at index i has row start + sum_a strides[a] i[a] of a linear layer as a factor.

    way: ids of the tensors from the layer's output to this one.
    """

    module: str
    start: int
    strides: tuple[int, ...]
    way: tuple[int, ...]

    def moved(self, strides: tuple[int, ...] | None) -> _Rows | None:
        return None if strides is None else replace(self, strides=strides)


@dataclass
class Follower:
    """Follows the rows of linear layers from function to function; `names` of the modules."""

    names: Mapping[nn.Module, str]
    _rows: dict[int, _Rows] = field(default_factory=dict)  # by id of a tensor
    _joined: dict[int, list[_Rows | None]] = field(default_factory=dict)  # of tensors that are joined by channels
    _uses: Counter[int] = field(default_factory=Counter)
    _slices: dict[int, list[range]] = field(default_factory=dict)  # rows that were taken by x[..., a:b]
    _calls: Counter[str] = field(default_factory=Counter)
    _inputs: dict[str, tuple[_Rows, int]] = field(default_factory=dict)  # of linear layers: rows and width
    _kept: list[Tensor] = field(default_factory=list)  # an id is unique while its tensor lives

    def function(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """A function was called."""
        pieces = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        known = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and self._is_known(x)]
        first = next(iter((*args, *kwargs.values())), None)
        if name == "__setitem__":
            self._uses.update(id(x) for x in known)
        if not pieces or not known or name in UNSEEN or (name in RESHAPES and output is first):
            return
        x = known[0]
        rows = self._rows.get(id(x))
        if name == "__getitem__" and x is first and rows is not None and self._slice(x, rows, args[1], pieces[0]):
            return
        self._uses.update(id(x) for x in known)
        if name in ("cat", "concat", "concatenate"):
            self._join(first, output)
        elif name == "mul" and rows is not None and output.shape == x.shape:
            self._keep(output, rows)
        elif x is first and id(x) in self._joined and name == "split":
            for piece, part in zip(pieces, self._joined[id(x)], strict=False):
                self._keep(piece, None if part is None else replace(part, way=(*part.way, id(x))))
        elif x is first and rows is not None:
            self._follow(name, x, rows, (args[1:], kwargs), pieces)

    def _follow(self, name: str, x: Tensor, rows: _Rows, settings: tuple[Any, ...], pieces: list[Tensor]) -> None:
        """The tensor `x` has other axes, or comes in pieces."""
        if name in RESHAPES:
            self._keep(pieces[0], rows.moved(reshaped(x.shape, rows.strides, pieces[0].shape)))
        elif name in ("transpose", "swapaxes", "permute"):
            axes = [axis for axis in tree_leaves(settings) if isinstance(axis, int)]
            self._keep(pieces[0], rows.moved(_permuted(rows.strides, axes, name == "permute")))
        elif name in PIECES:
            given, named = settings
            axis = named.get("dim", given[-1] if len(given) >= PIECES[name] else 0) % x.ndim
            start, stride = rows.start, rows.strides[axis]
            left = rows.strides[:axis] + rows.strides[axis + 1 :] if name == "unbind" else rows.strides
            for piece in pieces if stride else ():  # pieces of tokens hold the same rows, which is a second use
                self._keep(piece, replace(rows, start=start, strides=left))
                start += stride * (1 if name == "unbind" else piece.shape[axis])

    def _slice(self, x: Tensor, rows: _Rows, index: Any, piece: Tensor) -> bool:
        """Whether `index` takes some of the channels on the last axis, x[..., a:b], and nothing else."""
        if rows.strides[-1] != 1 or not isinstance(index, tuple) or index[:1] != (...,) or len(index) != 2:
            return False
        if not isinstance(index[1], slice) or index[1].step not in (None, 1):
            return False
        start = rows.start + index[1].indices(x.shape[-1])[0]
        self._keep(piece, replace(rows, start=start))
        self._slices.setdefault(id(x), []).append(range(start, start + piece.shape[-1]))
        return True

    def linear(self, module: nn.Module, args: Sequence[Any], output: Tensor) -> None:
        """A linear layer was called: a divisor of its input may have a place, and its rows may be one."""
        name = self.names[module]
        self._calls[name] += 1
        rows = self._rows.get(id(args[0])) if args else None
        if rows is not None:
            self._inputs[name] = rows, args[0].shape[-1]
        self._keep(output, _Rows(name, 0, (0,) * (output.ndim - 1) + (1,), ()))

    def value_product(self, v: Tensor, output: Tensor) -> None:
        """Attention was called: an output channel is a mean over the tokens of the same channel of v (N, H, S, d)."""
        rows = self._rows.get(id(v))
        if rows is not None and rows.strides[2] == 0:
            self._keep(output, rows)

    def folds(self, network: nn.Module) -> dict[str, tuple[Fold, ...]]:
        """Linear layer -> where a divisor of its input can go."""
        found: dict[str, tuple[Fold, ...]] = {}
        for name, (rows, width) in self._inputs.items():
            mine = range(rows.start, rows.start + width)
            used_once = all(self._uses[each] + self._taken(each, mine) == 1 for each in rows.way)
            called_once = self._calls[name] == self._calls[rows.module] == 1
            if used_once and called_once and rows.strides[-1] == 1 and not any(rows.strides[:-1]):
                weights = (network.get_submodule(each).weight for each in (name, rows.module))
                if not any(self._is_shared(network, weight) for weight in weights):
                    found[name] = (Fold(rows.module, rows.start, rows.start + width),)
        return found

    def _taken(self, tensor: int, rows: range) -> int:
        """How many slices of a tensor have any of these rows."""
        return sum(max(each.start, rows.start) < min(each.stop, rows.stop) for each in self._slices.get(tensor, ()))

    @staticmethod
    def _is_shared(network: nn.Module, weight: Any) -> bool:
        named = network.named_parameters(remove_duplicate=False)
        return sum(parameter is weight for _, parameter in named) > 1

    def _is_known(self, x: Tensor) -> bool:
        return id(x) in self._rows or id(x) in self._joined

    def _keep(self, x: Tensor, rows: _Rows | None) -> None:
        if rows is not None:
            self._rows[id(x)] = replace(rows, way=(*rows.way, id(x)))
            self._kept.append(x)

    def _join(self, parts: Any, output: Tensor) -> None:
        """Channels of several tensors side by side; `SumOfColumns` splits them again."""
        if output.shape[-1] == sum(part.shape[-1] for part in parts):
            self._joined[id(output)] = [self._rows.get(id(part)) for part in parts]
            self._kept.append(output)


def _permuted(strides: tuple[int, ...], axes: Sequence[int], all_axes: bool) -> tuple[int, ...]:
    """axes: the new order, or two that change places."""
    if all_axes:
        return tuple(strides[axis] for axis in axes)
    found, (a, b) = list(strides), axes
    found[a], found[b] = found[b], found[a]
    return tuple(found)


def reshaped(old: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """Strides of rows in another shape of the same elements; None if an axis would hold rows and something else."""
    found = [0] * len(new)
    left = [(size, stride) for size, stride in zip(old, strides, strict=True) if size != 1]
    right = [axis for axis, size in enumerate(new) if size != 1]
    while left:  # the fewest axes of both that have equally many elements
        taken, axes = [left.pop(0)], [right.pop(0)]
        while (have := math.prod(size for size, _ in taken)) != (want := math.prod(new[axis] for axis in axes)):
            if have < want:
                taken.append(left.pop(0))
            else:
                axes.append(right.pop(0))
        if not any(stride for _, stride in taken):
            continue
        stride = taken[-1][1]
        for size, expected in reversed(taken):  # one line of rows
            if not stride or stride != expected:
                return None
            stride *= size
        stride = taken[-1][1]
        for axis in reversed(axes):
            found[axis] = stride
            stride *= new[axis]
    return tuple(found)
