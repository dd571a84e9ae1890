"""Phase 2: what a search needs of each product: inputs, squared gradients, ranges (Algorithm 1, lines 9 to 12).

One forward and one backward pass over the whole network record every product. Of each row only some tokens and heads
are kept, since a search looks at no more; ranges are those of all. The samples go to disk batch by batch, so memory
holds one batch with its gradients, and a killed run continues with the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tqdit.calibration.work import WorkFolder
from tqdit.errors import UsageError
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Convolution, Scores, ValueProduct, patches, stand_in, watched

MOST_HEADS = 8  # of a row
HEAD_ELEMENTS = 2**24  # of K or V, in all rows of one product
GRAPH_BYTES = 30_000_000  # of what autograd keeps for one batch
MOST_ROWS = 64  # of one batch

Cotangent = Callable[[Tensor, Tensor], Tensor]  # row numbers (N,), output (N, K, ...) -> cotangent like the output


@dataclass(frozen=True)
class Samples:
    """One product's samples. S tokens of each row; for a product without tokens S is 1.

    Linear and convolution: left (R, S, K), g2 (R, S, O). Attention: left (R, H, S, K), right (R, H, K, O), g2
    (R, H, S, O), bfloat16, of the H heads that are kept. ranges: smallest and largest value (R,) of each operand over
    all tokens and heads of a row; channels: the same of each input channel of a linear layer, (R, K).
    """

    left: Tensor
    right: Tensor | None
    g2: Tensor
    ranges: dict[str, tuple[Tensor, Tensor]]
    channels: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Picker:
    """Which tokens and heads of each of R rows are kept, at random but seeded.

    K and V are kept with all their tokens, which for 16 heads is more memory than everything else together.
    """

    rows: int
    share: float
    seed: int

    def tokens(self, tokens: int) -> Tensor:
        """int64 (R, S), S = ceil(share T)."""
        return choose(self.rows, tokens, max(1, -int(-self.share * tokens // 1)), self.seed)

    def heads(self, heads: int, head_elements: int) -> Tensor:
        """int64 (R, H): all, or as many as fit; head_elements is the size of K or V of one head."""
        most = max(1, min(MOST_HEADS, HEAD_ELEMENTS // (self.rows * head_elements)))
        return choose(self.rows, heads, most, self.seed + 1)  # apart from the tokens

    def keep(self, matrix: Tensor, start: int, head_elements: int) -> Tensor:
        """The kept heads and tokens of (N, T, K) or (N, H, T, K), rows from `start`; a product without tokens keeps
        its one."""
        if matrix.ndim == 4:
            matrix = self.keep_heads(matrix, start, head_elements)
        axis = matrix.ndim - 2
        if matrix.shape[axis] == 1:
            return matrix.clone()  # several products may share an input, and files hold no tensor twice
        index = self.tokens(matrix.shape[axis])[start : start + len(matrix)].to(matrix.device)
        index = index.reshape(len(matrix), *[1] * (axis - 1), index.shape[1], 1)
        return matrix.gather(axis, index.expand(*matrix.shape[:axis], -1, matrix.shape[-1]))

    def keep_heads(self, x: Tensor, start: int, head_elements: int) -> Tensor:
        """The kept heads of (N, H, T, K)."""
        index = self.heads(x.shape[1], head_elements)[start : start + len(x)].to(x.device)
        if index.shape[1] == x.shape[1]:
            return x
        return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))


class ProductRecorder:
    """Collects the samples of some products during one network call."""

    def __init__(self, network: nn.Module, names: Sequence[str], picker: Picker) -> None:
        self._network, self._names, self.picker = network, names, picker
        self.found: dict[str, list[dict[str, Tensor]]] = {}  # of each product, call by call
        self._start = self._rows = 0
        self.is_recording = False

    @contextmanager
    def listen(self, start: int, rows: int) -> Iterator[None]:
        """Record a call, whose first row is number `start`, and the backward pass after it."""
        self._start, self._rows, self.found = start, rows, {}
        self.is_recording = True
        with watched(self._network, self._names, self._record):
            yield

    def _record(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not output.requires_grad:
            output.requires_grad_()  # its gradient starts here
        if self.is_recording and inputs[0].numel():  # a part of a network may be called with nothing
            operands = [self._matrix(module, tensor.detach()) for tensor in inputs]
            part = self._operands(module, operands)
            weigh = partial(self._weigh, module, part, _Tokens.of(module, operands))
            weigh(torch.zeros_like(output))  # if no gradient comes
            self.found.setdefault(name, []).append(part)
            output.register_hook(weigh)  # type: ignore[no-untyped-call]
        return output.clone() if output.is_leaf else None  # the network may change the clone in place

    def _operands(self, module: nn.Module, operands: list[Tensor]) -> dict[str, Tensor]:
        left, elements = operands[0], _head_elements(operands)
        part = {"left": self.picker.keep(left, self._start, elements)}
        if isinstance(module, nn.Linear):
            part["channel.low"], part["channel.high"] = left.amin(1), left.amax(1)
        if len(operands) > 1:
            right = self.picker.keep_heads(operands[1], self._start, elements)
            part["right"] = (right.transpose(-2, -1) if isinstance(module, Scores) else right).contiguous()
        return part

    def _matrix(self, module: nn.Module, x: Tensor) -> Tensor:
        """An operand as rows of tokens: (N, T, K), or (N, H, T, K) of attention; axis 0 may hold more than rows."""
        if isinstance(module, Convolution):
            x = patches(x, module.kernel_size)
        return self._by_rows(x, isinstance(module, Scores | ValueProduct))

    def _by_rows(self, x: Tensor, is_attention: bool) -> Tensor:
        if len(x) % self._rows:
            raise UsageError(
                f"a layer takes {len(x)} rows in a call with {self._rows}, expected a multiple: it computes what is "
                "alike for all rows. Such networks cannot be calibrated yet."
            )
        return x.reshape(self._rows, -1, *(x.shape[-2:] if is_attention else x.shape[-1:]))

    def _weigh(self, module: nn.Module, part: dict[str, Tensor], tokens: _Tokens, gradient: Tensor) -> None:
        """Put in what the gradient of the product tells: g2, and ranges of the tokens that it says count."""
        if isinstance(module, Convolution):
            gradient = gradient.flatten(2).transpose(1, 2)
        elif isinstance(module, Scores):  # samples leave the factor 1 / sqrt(d) out of the product and put it here
            gradient = gradient * part["left"].shape[-1] ** -0.5
        gradient = self._by_rows(gradient, "right" in part)
        elements = part["right"].shape[-1] * part["right"].shape[-2] if "right" in part else 1
        # bfloat16 has the range of float32, and 8 bits are plenty for the weight of an error
        part["g2"] = self.picker.keep(gradient, self._start, elements).square().to(torch.bfloat16)
        moved = gradient != 0
        counted = moved.any(-1)
        part["left.low"], part["left.high"] = _of_rows(*tokens.left, counted)
        if tokens.right is not None:
            used = moved.any(-2) if tokens.used is None else tokens.used
            part["right.low"], part["right.high"] = _of_rows(*tokens.right, used)
        if "channel.low" in part and not counted.all():
            self._leave_out(part, counted)

    def _leave_out(self, part: dict[str, Tensor], counted: Tensor) -> None:
        """Ranges of the channels of rows with tokens (N, T) that do not count: those of the kept ones that do."""
        kept = self.picker.keep(counted[..., None], self._start, 1)
        padded = kept.any(1) & ~counted.all(1, keepdim=True)
        for key, reduce, worst in (("low", Tensor.amin, torch.inf), ("high", Tensor.amax, -torch.inf)):
            found = reduce(part["left"].masked_fill(~kept, worst), 1)
            part[f"channel.{key}"] = torch.where(padded, found, part[f"channel.{key}"])

    def samples(self) -> dict[str, Tensor]:
        """The recorded tensors as `NAME|KEY`, g2 the squared gradient of the product.

        A product that was called several times has the tokens of all its calls.
        """
        return {
            f"{name}|{key}": _join(key, [part[key] for part in parts])
            for name, parts in self.found.items()
            for key in parts[0]
        }


@dataclass(frozen=True)
class _Tokens:
    """Of the operands of a product: smallest and largest value of each token, (N, ..., T).

    used: of v, tokens that have a probability.
    """

    left: tuple[Tensor, Tensor]
    right: tuple[Tensor, Tensor] | None
    used: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, operands: list[Tensor]) -> _Tokens:
        left, *right = ((x.amin(-1), x.amax(-1)) for x in operands)
        used = operands[0].amax(-2) > 0 if isinstance(module, ValueProduct) else None
        return cls(left, right[0] if right else None, used)


def _of_rows(low: Tensor, high: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The range (N,) of each row over the tokens that count; over all where none does. All (N, ..., T).

    What a mask hides has no gradient, and no value of it may cost codes.
    """
    counted = counted.flatten(1)
    counted = counted | ~counted.any(1, keepdim=True)
    lowest = low.flatten(1).masked_fill(~counted, torch.inf).amin(1)
    return lowest, high.flatten(1).masked_fill(~counted, -torch.inf).amax(1)


def _join(key: str, tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].contiguous()
    if key.endswith((".low", ".high")):
        stacked = torch.stack(tensors)
        return stacked.amin(0) if key.endswith(".low") else stacked.amax(0)
    return torch.cat(tensors, dim=-2)


def _head_elements(operands: list[Tensor]) -> int:
    """Of K or V of one head."""
    return int(operands[1].shape[-1] * operands[1].shape[-2]) if len(operands) > 1 else 1


@dataclass(frozen=True)
class Capture:
    """The samples of some products of a model on R rows, kept in a work folder under `label`."""

    model: LoadedModel
    names: tuple[str, ...]
    inputs: dict[str, Tensor]  # port -> (R, ...)
    picker: Picker
    cotangent: Cotangent
    folder: WorkFolder
    label: str = "samples"

    @cached_property
    def batches(self) -> list[range]:
        size = self._batching.rows
        return [range(start, min(start + size, self.picker.rows)) for start in range(0, self.picker.rows, size)]

    @cached_property
    def _batching(self) -> Batching:
        return choose_batching(self.model, self.inputs)

    @property
    def forward_passes(self) -> int:
        """Of each row: blocks that are computed again take a second one."""
        return 2 if self._batching.recompute else 1

    def _file(self, batch: range) -> str:
        return f"{self.label}-{batch.start:07d}"

    def run(self, done: Callable[[int], object]) -> int:
        """Record what is not on disk yet; `done` gets the number of rows of each batch. Returns the rows recorded."""
        recorded = 0
        for batch in self.batches:
            if not self.folder.has(self._file(batch)):
                self.folder.save(self._file(batch), self._record(batch))
                recorded += len(batch)
            done(len(batch))
        return recorded

    def _record(self, batch: range) -> dict[str, Tensor]:
        recorder = ProductRecorder(self.model.network, self.names, self.picker)
        inputs = {name: tensor[batch.start : batch.stop] for name, tensor in self.inputs.items()}
        inputs[self.model.signature.state.name].requires_grad_()  # or a block that is computed again would differ
        blocks = recomputed(self.model.network) if self._batching.recompute else nullcontext()
        with torch.enable_grad(), blocks, recorder.listen(batch.start, len(batch)):
            output = self.model.call(inputs)
            recorder.is_recording = False  # blocks that are computed again in the backward pass are recorded once
            rows = torch.arange(batch.start, batch.stop, device=output.device)
            torch.autograd.backward(output, self.cotangent(rows, output.detach()))
        return recorder.samples()

    def samples(self, name: str) -> Samples:
        """Everything of one product, read from disk."""
        keys = self.folder.keys(self._file(self.batches[0]), f"{name}|")
        tensors = {
            key: self.folder.join([self._file(batch) for batch in self.batches], f"{name}|{key}") for key in keys
        }
        roles = ("left", "right") if "right" in tensors else ("left",)
        ranges = {role: (tensors[f"{role}.low"], tensors[f"{role}.high"]) for role in roles}
        channels = (tensors["channel.low"], tensors["channel.high"]) if "channel.low" in tensors else None
        return Samples(tensors["left"], tensors.get("right"), tensors["g2"], ranges, channels)

    def delete(self) -> None:
        for batch in self.batches:
            self.folder.remove(self._file(batch))


@dataclass(frozen=True)
class Batching:
    """Rows per batch, and whether blocks are computed again in the backward pass instead of kept."""

    rows: int
    recompute: bool


def choose_batching(model: LoadedModel, inputs: dict[str, Tensor]) -> Batching:
    """As many rows as autograd can keep the intermediate tensors of, measured on one row."""
    whole = _kept_bytes(model, inputs)
    if 4 * whole <= GRAPH_BYTES:
        return Batching(min(MOST_ROWS, GRAPH_BYTES // max(1, whole)), recompute=False)
    blocks = sum(len(blocks) for blocks in _block_lists(model.network)) or 1
    with recomputed(model.network):
        kept = _kept_bytes(model, inputs) + whole // blocks
    return Batching(max(1, min(MOST_ROWS, GRAPH_BYTES // kept)), recompute=True)


def _kept_bytes(model: LoadedModel, inputs: dict[str, Tensor]) -> int:
    """Of what autograd keeps of a call with one row, without the weights; measured on tensors without memory."""
    network, fake = stand_in(model.network), FakeTensorMode(allow_non_fake_inputs=True)
    parameters: dict[str, Tensor] = {n: fake.from_tensor(t) for n, t in model.network.named_parameters()}
    weights = {tensor.untyped_storage()._cdata for tensor in parameters.values()}
    kept: dict[int, Tensor] = {}  # by storage, whose address is unique while the tensor lives

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    one = {name: fake.from_tensor(tensor[:1].clone()) for name, tensor in inputs.items()}
    with fake, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        one[model.signature.state.name].requires_grad_()
        functional_call(network, parameters, kwargs=model.arguments(one))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _block_lists(network: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of modules: a transformer's blocks."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    found = [network.get_submodule(name) for name in outermost]
    return [blocks for blocks in found if isinstance(blocks, nn.ModuleList)]


@contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """Inside, the blocks of the network are computed again in the backward pass, so their tensors need not be kept."""
    blocks = [block for blocks in _block_lists(network) for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@lru_cache(maxsize=64)
def choose(rows: int, count: int, most: int, seed: int) -> Tensor:
    """For each row a random subset of 0..count - 1 in increasing order: int64 (R, min(count, most))."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, count, generator=generator).argsort(dim=1)[:, :most].sort(dim=1).values
