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

from tqdit.bounds import check_disk
from tqdit.calibration.work import WorkFolder
from tqdit.errors import UsageError
from tqdit.models.blocks import block_names
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Convolution, Scores, ValueProduct, patches, stand_in, watched

MOST_HEADS = 8  # of a row
HEAD_ELEMENTS = 2**24  # of K or V, in all rows of one product
LEAST_PAIRS = 64  # of a row and a head, however long the sequence; with more rows than that, some rows have none
TOKEN_ELEMENTS = 2**27  # of the tokens and their gradients of one product; 8,738 tokens of 3,072 -> 12,288 channels
GRAPH_BYTES = 30_000_000  # of what autograd keeps for one batch
MOST_ROWS = 64  # of one batch

Cotangent = Callable[[Tensor, Tensor], Tensor]  # row numbers (N,), output (N, K, ...) -> cotangent like the output


@dataclass(frozen=True)
class Samples:
    """One product's samples. S tokens of each row; for a product without tokens S is 1.

    Linear and convolution: left (R, S, K), g2 (R, S, O). Attention: left (R, H, S, K), right (R, H, K, O), g2
    (R, H, S, O), bfloat16, of the H heads that are kept. ranges: smallest and largest value (R,) of each operand over
    all tokens and heads of a row; channels: the same of each input channel of a linear layer, (R, K). rows: the numbers
    (R',) of those that left, right and g2 hold, if not all.
    """

    left: Tensor
    right: Tensor | None
    g2: Tensor
    ranges: dict[str, tuple[Tensor, Tensor]]
    channels: tuple[Tensor, Tensor] | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """What is kept of the N rows of one product in a batch: rows (N',) if not all, heads (N', H), tokens (N', S)."""

    rows: Tensor | None
    heads: Tensor | None  # None: all, or none are there
    tokens: Tensor

    def whole_heads(self, x: Tensor) -> Tensor:
        """The kept heads of (N, H, T, K), with all tokens."""
        x = x if self.rows is None else x[self.rows]
        return x if self.heads is None else x.gather(1, self.heads[:, :, None, None].expand(-1, -1, *x.shape[2:]))

    def keep(self, x: Tensor) -> Tensor:
        """The kept tokens of (N, T, K) or (N, H, T, K); a product without tokens keeps its one."""
        x = self.whole_heads(x) if x.ndim == 4 else x
        axis = x.ndim - 2
        if x.shape[axis] == 1:
            return x.clone()  # several products may share an input, and files hold no tensor twice
        index = self.tokens.reshape(len(x), *[1] * (axis - 1), self.tokens.shape[1], 1)
        return x.gather(axis, index.expand(*x.shape[:axis], -1, x.shape[-1]))


@dataclass(frozen=True)
class Picker:
    """Which rows, heads and tokens of a product on R rows are kept, at random but seeded.

    K and V are kept with all their tokens, which for 16 heads is more memory than everything else together. What is
    kept of one product is bounded, whatever the width, the sequence and the number of rows.
    """

    rows: int
    share: float
    seed: int

    def cut(self, batch: range, operands: Sequence[Tensor], outputs: int) -> Cut:
        """operands: of the batch, (N, T, K) or (N, H, T, K) twice; outputs: O of the product."""
        left, kept, width, heads = operands[0], self.rows, 1, None
        if left.ndim == 4:
            pairs = max(LEAST_PAIRS, HEAD_ELEMENTS // (operands[1].shape[-1] * operands[1].shape[-2]))
            kept, width = min(self.rows, pairs), min(left.shape[1], MOST_HEADS, max(1, pairs // self.rows))
            if width < left.shape[1]:
                heads = choose(self.rows, left.shape[1], width, self.seed + 1)  # apart from the tokens
        most = TOKEN_ELEMENTS // (kept * width * (left.shape[-1] + outputs))
        count = max(1, min(-int(-self.share * left.shape[-2] // 1), most))
        tokens = choose(self.rows, left.shape[-2], count, self.seed)
        chosen = spread(self.rows, kept, self.seed + 2)
        chosen = chosen[(chosen >= batch.start) & (chosen < batch.stop)]
        index = [None if t is None else t[chosen].to(left.device) for t in (heads, tokens)]
        assert index[1] is not None
        return Cut(None if kept == self.rows else (chosen - batch.start).to(left.device), index[0], index[1])


class ProductRecorder:
    """Collects the samples of some products during one network call."""

    def __init__(self, network: nn.Module, names: Sequence[str], picker: Picker) -> None:
        self._network, self._names, self.picker = network, names, picker
        self.found: dict[str, list[dict[str, Tensor]]] = {}  # of each product, call by call
        self._batch = range(0)
        self.is_recording = False

    @contextmanager
    def listen(self, batch: range) -> Iterator[None]:
        """Record a call with these rows, and the backward pass after it."""
        self._batch, self.found = batch, {}
        self.is_recording = True
        with watched(self._network, self._names, self._record):
            yield

    def _record(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not output.requires_grad:
            output.requires_grad_()  # its gradient starts here
        if self.is_recording:
            operands = [self._matrix(module, tensor.detach()) for tensor in inputs]
            outputs = output.shape[1 if isinstance(module, Convolution) else -1]
            cut = self.picker.cut(self._batch, operands, outputs)
            part = self._operands(module, operands, cut)
            weigh = partial(self._weigh, module, part, cut, _Tokens.of(module, operands))
            weigh(output.new_zeros(()).expand_as(output))  # if no gradient comes
            self.found.setdefault(name, []).append(part)
            output.register_hook(weigh)  # type: ignore[no-untyped-call]
        return output.clone() if output.is_leaf else None  # the network may change the clone in place

    def _operands(self, module: nn.Module, operands: list[Tensor], cut: Cut) -> dict[str, Tensor]:
        left = operands[0]
        part = {"left": cut.keep(left)}
        if cut.rows is not None:
            part["rows"] = cut.rows + self._batch.start
        if isinstance(module, nn.Linear):
            part["channel.low"], part["channel.high"] = left.amin(1), left.amax(1)
        if len(operands) > 1:
            right = cut.whole_heads(operands[1])
            part["right"] = (right.transpose(-2, -1) if isinstance(module, Scores) else right).contiguous()
        return part

    def _matrix(self, module: nn.Module, x: Tensor) -> Tensor:
        """An operand as rows of tokens: (N, T, K), or (N, H, T, K) of attention; axis 0 may hold more than rows."""
        if isinstance(module, Convolution):
            x = patches(x, module.kernel_size)
        return self._by_rows(x, isinstance(module, Scores | ValueProduct))

    def _by_rows(self, x: Tensor, is_attention: bool) -> Tensor:
        rows = len(self._batch)
        if not x.numel() or len(x) % rows:
            raise UsageError(
                f"a layer takes {list(x.shape)} in a call with {rows} rows, expected values for each row. Such "
                "networks cannot be calibrated yet."
            )
        return x.reshape(rows, -1, *(x.shape[-2:] if is_attention else x.shape[-1:]))

    def _weigh(self, module: nn.Module, part: dict[str, Tensor], cut: Cut, tokens: _Tokens, gradient: Tensor) -> None:
        """Put in what the gradient of the product tells: g2, and ranges of the tokens that it says count."""
        if isinstance(module, Convolution):
            gradient = gradient.flatten(2).transpose(1, 2)
        gradient = self._by_rows(gradient, "right" in part)
        kept = cut.keep(gradient)
        if isinstance(module, Scores):  # samples leave the factor 1 / sqrt(d) out of the product and put it here
            kept = kept * part["left"].shape[-1] ** -0.5
        # bfloat16 has the range of float32, and 8 bits are plenty for the weight of an error
        part["g2"] = kept.square().to(torch.bfloat16)
        moved = gradient != 0
        counted = moved.any(-1)
        part["left.low"], part["left.high"] = _of_rows(*tokens.left, counted)
        if tokens.right is not None:
            used = moved.any(-2) if tokens.used is None else tokens.used
            part["right.low"], part["right.high"] = _of_rows(*tokens.right, used)
        if "channel.low" in part and not counted.all():
            _leave_out(part, cut, counted)

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
    """The range (N,) of each row over the tokens that count; over all if none does. All (N, ..., T).

    What a mask hides has no gradient, and no value of it may cost codes.
    """
    counted = counted.flatten(1)
    counted = counted | ~counted.any(1, keepdim=True)
    lowest = low.flatten(1).masked_fill(~counted, torch.inf).amin(1)
    return lowest, high.flatten(1).masked_fill(~counted, -torch.inf).amax(1)


def _leave_out(part: dict[str, Tensor], cut: Cut, counted: Tensor) -> None:
    """Ranges of the channels of rows with tokens (N, T) that do not count: those of the kept ones that do."""
    kept = cut.keep(counted[..., None])
    padded = kept.any(1) & ~counted.all(1, keepdim=True)
    for key, reduce, worst in (("low", Tensor.amin, torch.inf), ("high", Tensor.amax, -torch.inf)):
        found = reduce(part["left"].masked_fill(~kept, worst), 1)
        part[f"channel.{key}"] = torch.where(padded, found, part[f"channel.{key}"])


def _join(key: str, tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1 or key == "rows":
        return tensors[0].contiguous()
    if key.endswith((".low", ".high")):
        stacked = torch.stack(tensors)
        return stacked.amin(0) if key.endswith(".low") else stacked.amax(0)
    return torch.cat(tensors, dim=-2)


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
                samples = self._record(batch)
                rest = sum(t.nbytes for t in samples.values()) * (self.picker.rows - batch.start) // len(batch)
                check_disk(self.folder.path, rest, "Lower --rows-per-group or --token-share.")
                self.folder.save(self._file(batch), samples)
                recorded += len(batch)
            done(len(batch))
        return recorded

    def _record(self, batch: range) -> dict[str, Tensor]:
        recorder = ProductRecorder(self.model.network, self.names, self.picker)
        inputs = {name: tensor[batch.start : batch.stop] for name, tensor in self.inputs.items()}
        inputs[self.model.signature.state.name].requires_grad_()  # or a block that is computed again would differ
        blocks = recomputed(self.model.network) if self._batching.recompute else nullcontext()
        with torch.enable_grad(), blocks, recorder.listen(batch), self.model.weights.lent():
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
        return Samples(tensors["left"], tensors.get("right"), tensors["g2"], ranges, channels, tensors.get("rows"))

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
    whole = kept_bytes(model, inputs)
    if 4 * whole <= GRAPH_BYTES:
        return Batching(min(MOST_ROWS, GRAPH_BYTES // max(1, whole)), recompute=False)
    blocks = len(block_names(model.network)) or 1
    with recomputed(model.network):
        kept = kept_bytes(model, inputs) + whole // blocks
    return Batching(max(1, min(MOST_ROWS, GRAPH_BYTES // kept)), recompute=True)


def kept_bytes(model: LoadedModel, inputs: dict[str, Tensor]) -> int:
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


@contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """Inside, the blocks of the network are computed again in the backward pass, so their tensors need not be kept."""
    blocks = [network.get_submodule(name) for name in block_names(network)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def spread(rows: int, count: int, seed: int) -> Tensor:
    """`count` of 0..rows - 1 in increasing order, one at random of each of as many equal parts: int64 (count,)."""
    if count == rows:
        return torch.arange(rows)
    generator = torch.Generator().manual_seed(seed)
    return ((torch.arange(count) + torch.rand(count, generator=generator)) * (rows / count)).long().clamp(max=rows - 1)


@lru_cache(maxsize=64)
def choose(rows: int, count: int, most: int, seed: int) -> Tensor:
    """For each row a random subset of 0..count - 1 in increasing order: int64 (R, min(count, most))."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, count, generator=generator).argsort(dim=1)[:, :most].sort(dim=1).values
