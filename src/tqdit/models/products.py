"""The products of a network: linear layers, convolutions, and the two products of each attention.

`find_products` makes them explicit and describes them from one observed call. Attention that is computed by
`scaled_dot_product_attention` becomes submodules `OWNER.sdpa.{scores, softmax, value_product}` of the module that calls
it, so each tensor that a quantizer wants is some submodule's input or output. A network keeps its parameters and names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tqdit.models.folds import Fold, Follower

Place = Literal["block", "attention", "patch", "final", "conditioning"]
Maker = Literal["gelu", "softmax"]
Watch = Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
MASKED = -1e30  # a score that no probability is left of, and whose products are finite


@dataclass(frozen=True)
class Product:
    """One product of the network, by the name of its module.

    place: `patch` is the first product on tokens, `final` the last, `conditioning` multiplies one vector per row.
    """

    name: str
    place: Place
    made_by: Maker | None = None  # the activation that makes its input, or its left operand
    row_blocks: int = 1  # matrices that are stacked in its weight: q, k and v in a fused qkv
    folds: tuple[Fold, ...] = ()  # empty: a divisor of its input has no place to go
    folded: bool = False  # axis 0 of its operands holds more than the rows of a call: frames, words
    columns: int = 0  # the last axis of its input, or of its left operand: of a product with V the number of keys


class Scores(nn.Module):
    """q kᵀ / sqrt(d). q (N, heads, T, d) and k (N, heads, S, d); result (N, heads, T, S)."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)) * (q.shape[-1] ** -0.5)


class ValueProduct(nn.Module):
    """Probabilities (N, heads, T, S) times v (N, heads, S, d)."""

    def forward(self, probabilities: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(probabilities, v)


class Sdpa(nn.Module):
    """`scaled_dot_product_attention` with its two products and its softmax as submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = Scores()
        self.softmax = nn.Softmax(dim=-1)
        self.value_product = ValueProduct()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        """q (N, heads, T, d), k and v (N, heads or fewer, S, d); mask bool or float, broadcast to (N, heads, T, S).

        There may be no heads, or several axes of them; the products have one.
        """
        if enable_gqa and k.shape[-3] != q.shape[-3]:
            repeats = q.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
        if scale is not None and abs(scale * q.shape[-1] ** 0.5 - 1) > 1e-6:
            q = q * (scale * q.shape[-1] ** 0.5)
        if is_causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        rows = q.shape[:-1]
        if q.ndim != 4:
            if mask is not None:
                mask = mask.expand(*rows, k.shape[-2]).reshape(len(q), -1, q.shape[-2], k.shape[-2])
            q, k, v = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))
        scores = self.scores(q, k)
        if mask is not None:
            scores = scores.masked_fill(~mask, MASKED) if mask.dtype == torch.bool else scores + mask
        attended: Tensor = self.value_product(self.softmax(scores), v)
        return attended if len(rows) == 3 else attended.reshape(*rows, v.shape[-1])


class SumOfColumns(nn.Module):
    """A linear layer whose input joins columns of several origins, as a sum of layers that each take one of them.

    Each part then has scales of its own. The weights are views of the layer's.
    """

    def __init__(self, linear: nn.Linear, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.columns = nn.ModuleList(nn.Linear(width, linear.out_features, False, "meta") for width in widths)
        for part, weight in zip(self.columns, linear.weight.split(widths, dim=1), strict=True):
            part.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        self.columns[-1].bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., sum of the widths) -> (..., D)."""
        parts = (part(piece) for part, piece in zip(self.columns, x.split(self.widths, -1), strict=True))
        return reduce(torch.add, parts)


class _Route(TorchFunctionMode):
    """Sends the attention of one module to its submodules."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner, self._calls = owner, 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        given = dict(zip(ARGUMENTS, args, strict=False)) | (kwargs or {})
        sdpa = getattr(self._owner, sdpa_name(self._calls))
        self._calls += 1
        return sdpa(
            *(given[name] for name in ARGUMENTS[:3]), given.get("attn_mask"), given.get("is_causal", False),
            given.get("scale"), given.get("enable_gqa", False),
        )  # fmt: skip


class _Local:
    """Keeps the routing active inside one module alone, so it holds in copies, traces and recomputed blocks."""

    def __init__(self) -> None:
        self._modes: list[_Route] = []

    def enter(self, module: nn.Module, _args: Any) -> None:
        mode = _Route(module)
        mode.__enter__()
        self._modes.append(mode)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._modes.pop().__exit__(None, None, None)


def sdpa_name(call: int) -> str:
    """Name of the submodule of a module's n-th attention."""
    return "sdpa" if call == 0 else f"sdpa_{call}"


Origin = str | None  # the activation that makes a tensor, or `gated` for its product with another tensor
Columns = tuple[tuple[int, Origin], ...]  # width and origin of what is joined along the last axis


@dataclass
class _Call:
    """What one product was called with: made_by and columns if they are the same in all calls.

    rows: the length of axis 0; 0 if calls differ.
    """

    ndim: int
    rows: int
    made_by: Origin
    columns: Columns | None
    width: int  # of the last axis, in the first call

    @property
    def maker(self) -> Maker | None:
        return next((maker for maker in get_args(Maker) if maker == self.made_by), None)


@dataclass
class _Observed(TorchFunctionMode):
    """One call of a network: its products in the order of their calls, and who computes attention how often."""

    names: dict[nn.Module, str]
    owners: list[nn.Module] = field(default_factory=list)  # of the function that runs, innermost last
    attention: dict[str, int] = field(default_factory=dict)  # by the name of its owner
    products: dict[str, _Call] = field(default_factory=dict)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)  # of the products
    made: dict[int, Origin] = field(default_factory=dict)  # by id of a tensor
    joined: dict[int, Columns] = field(default_factory=dict)
    follower: Follower = field(init=False)
    shape: torch.Size = field(init=False)  # of the prediction
    varying: set[int] = field(default_factory=set)  # tensors that depend on the network's arguments
    kept: list[Tensor] = field(default_factory=list)  # an id is unique while its tensor lives

    def __post_init__(self) -> None:
        super().__init__()
        self.follower = Follower(self.names)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if self._varies((args, kwargs)):
            self.vary((output, args[0] if function is Tensor.__setitem__ else ()))
        name, first = getattr(function, "__name__", ""), next(iter((*args, *(kwargs or {}).values())), ())
        if function is F.scaled_dot_product_attention:
            owner = self.names[self.owners[-1]]
            self.attention[owner] = self.attention.get(owner, 0) + 1
        elif name in ("gelu", "silu"):
            self._keep(output, name)
        elif name == "dropout":
            self._keep(output, self.made.get(id(first)))
        elif name == "mul" and any(self.made.get(id(factor)) for factor in args):
            self._keep(output, "gated")
        elif name in ("cat", "concat", "concatenate"):
            self._join(output, first or ())
        elif name == "split" and id(first) in self.joined:
            for piece, (_, origin) in zip(output, self.joined[id(first)], strict=False):
                self._keep(piece, origin)
        self.follower.function(name, args, kwargs or {}, output)
        return output

    def drop_dead(self, prediction: Tensor) -> None:
        """Forget products that the prediction does not depend on, such as the last block's of a second stream."""
        if not self.outputs:
            return
        tensors = [tensor for _, tensor in self.outputs]
        gradients = torch.autograd.grad(prediction.sum(), tensors, allow_unused=True)
        alive = {name for (name, _), gradient in zip(self.outputs, gradients, strict=True) if gradient is not None}
        self.products = {name: call for name, call in self.products.items() if name in alive}
        self.outputs = []

    def vary(self, values: Any) -> None:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        self.varying.update(map(id, tensors))
        self.kept += tensors

    def _varies(self, values: Any) -> bool:
        return any(id(value) in self.varying for value in tree_leaves(values))

    def _keep(self, tensor: Tensor, origin: Origin) -> None:
        self.made[id(tensor)] = origin
        self.kept.append(tensor)

    def _join(self, tensor: Tensor, parts: Iterable[Tensor]) -> None:
        """Of tensors that are joined along the last axis."""
        columns = tuple((part.shape[-1], self.made.get(id(part))) for part in parts)
        if tensor.shape[-1] == sum(width for width, _ in columns):
            self.joined[id(tensor)] = columns
            self.kept.append(tensor)

    def enter(self, module: nn.Module, _args: Any) -> None:
        self.owners.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """What goes on in the network: a product's output as a copy, which may be changed in place."""
        self.owners.pop()
        if isinstance(module, nn.Linear):
            self.follower.linear(module, args, output)
        elif isinstance(module, ValueProduct):
            self.follower.value_product(args[1], output)
        if isinstance(module, nn.Softmax):
            self._keep(output, "softmax")
        elif is_product(module) and self._varies(args):
            x = args[0]
            call = _Call(x.ndim, len(x), self.made.get(id(x)), self.joined.get(id(x)), x.shape[-1])
            first = self.products.setdefault(self.names[module], call)
            if (first.made_by, first.columns) != (call.made_by, call.columns):
                first.made_by = first.columns = None
            if first.rows != call.rows:
                first.rows = 0
            result: Tensor = output if output.requires_grad else output.requires_grad_()
            self.outputs.append((self.names[module], result))
            return result.clone()
        return None


def prediction_of(output: Any) -> Tensor:
    """The tensor in what a network returns: itself, or the first of a tuple or of a diffusers output.

    A list of rows is stacked.
    """
    if isinstance(output, Tensor):
        return output
    found: Tensor | list[Tensor] = output[0] if isinstance(output, tuple | list) else next(iter(output.values()))
    return torch.stack(found) if isinstance(found, list) else found


def is_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Convolution | Scores | ValueProduct)


def is_linear(module: nn.Module) -> bool:
    """A linear layer, or a convolution that is one on patches: its stride is its kernel, without padding or groups."""
    if not isinstance(module, Convolution):
        return isinstance(module, nn.Linear)
    padded = module.padding == "same" if isinstance(module.padding, str) else any(module.padding)
    return (
        module.stride == module.kernel_size
        and not padded
        and module.groups == 1
        and (set(module.dilation) == {1} or set(module.kernel_size) == {1})
    )


def patches(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, C, H, W) -> (N, T, C p p) with any number of axes in the place of H and W, T = (H // p)(W // p)."""
    grid = [side // step for side, step in zip(x.shape[2:], size, strict=True)]
    for axis, (tiles, step) in enumerate(zip(grid, size, strict=True), start=2):
        x = x.narrow(axis, 0, tiles * step)
    x = x.reshape(*x.shape[:2], *(length for pair in zip(grid, size, strict=True) for length in pair))
    x = x.permute(0, *range(2, x.ndim, 2), 1, *range(3, x.ndim, 2))  # (N, H / p, W / p, C, p, p)
    return x.reshape(len(x), math.prod(grid), -1)


def stand_in(network: nn.Module) -> nn.Module:
    """A copy with the same weights and buffers, which can be changed or called with tensors without memory.

    Networks keep tables of positions from one call to the next; those of such a call would spoil real ones.
    """
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def _observe(network: nn.Module, example: Mapping[str, Any]) -> _Observed:
    """One call with tensors that have shapes and no memory: large networks are loaded as fast as small ones."""
    network, fake = stand_in(network), FakeTensorMode(allow_non_fake_inputs=True)
    seen = _Observed({module: name for name, module in network.named_modules()})
    for module in network.modules():
        module.register_forward_pre_hook(seen.enter)
        module.register_forward_hook(seen.leave, always_call=True)
    arguments = tree_map_only(Tensor, fake.from_tensor, dict(example))
    seen.vary(arguments)
    with torch.enable_grad(), fake, seen:
        prediction = prediction_of(network(**arguments))
        seen.drop_dead(prediction)
        seen.shape = prediction.shape
    return seen


@contextmanager
def watched(network: nn.Module, names: Iterable[str], watch: Watch) -> Iterator[None]:
    """Inside, `watch(name, module, inputs, output)` follows each call of the modules of these names.

    A tensor that it returns goes on in the network in place of the output.
    """
    handles = [network.get_submodule(name).register_forward_hook(partial(watch, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_products(
    network: nn.Module, example: Mapping[str, Any], folds: Mapping[str, tuple[Fold, ...]] | None = None,
    row_blocks: Mapping[str, int] | None = None, rows: int | None = None,
) -> tuple[Product, ...]:  # fmt: skip
    """Make the network's products explicit, in place, and describe them in the order of their calls.

    A linear layer whose input joins columns that are made differently, such as attention and GELU, becomes a
    `SumOfColumns`.

    Products that the prediction does not depend on are left out, and those that depend on parameters alone.

    example: the network's arguments with `rows` rows, at least two (None: as many as its first argument has).
    folds, row_blocks: what a family knows about products by name; other folds are observed.
    """
    return find_products_and_shape(network, example, folds, row_blocks, rows)[0]


def find_products_and_shape(
    network: nn.Module, example: Mapping[str, Any], folds: Mapping[str, tuple[Fold, ...]] | None = None,
    row_blocks: Mapping[str, int] | None = None, rows: int | None = None,
) -> tuple[tuple[Product, ...], torch.Size]:  # fmt: skip
    """As `find_products`, with the shape of the prediction of these rows."""
    rows = len(next(iter(example.values()))) if rows is None else rows
    seen = _observe(network, example)
    joined = {
        name: columns for name, call in seen.products.items()
        if (columns := call.columns) and not _is_conditioning(call, rows)
        and len({origin for _, origin in columns}) > 1
    }  # fmt: skip
    for name, columns in joined.items():
        _split_columns(network, name, tuple(width for width, _ in columns))
    for name, count in seen.attention.items():
        owner = network.get_submodule(name)
        for number in range(count):
            owner.add_module(sdpa_name(number), Sdpa())
        local = _Local()
        owner.register_forward_pre_hook(local.enter)
        owner.register_forward_hook(local.leave, always_call=True)
    if joined or seen.attention:
        seen = _observe(network, example)
    called = seen.products
    on_tokens = [name for name, call in called.items() if not _is_conditioning(call, rows)]

    def place(name: str, call: _Call) -> Place:
        if isinstance(network.get_submodule(name), Scores | ValueProduct):
            return "attention"
        if _is_conditioning(call, rows):
            return "conditioning"
        return "patch" if name == on_tokens[0] else "final" if name == on_tokens[-1] else "block"

    row_blocks, folds = row_blocks or {}, {**seen.follower.folds(network), **(folds or {})}
    products = tuple(
        Product(name, place(name, call), call.maker, row_blocks.get(name, 1), folds.get(name, ()), call.rows != rows,
                call.width)
        for name, call in called.items()
    )  # fmt: skip
    return products, seen.shape


def _split_columns(network: nn.Module, name: str, widths: tuple[int, ...]) -> None:
    linear = network.get_submodule(name)
    if isinstance(linear, nn.Linear):
        network.set_submodule(name, SumOfColumns(linear, widths))


def _is_conditioning(call: _Call, rows: int) -> bool:
    """One vector per row."""
    return call.ndim == 2 and call.rows == rows
