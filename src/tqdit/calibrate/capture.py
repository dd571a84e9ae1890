"""Phase 2: what a search needs of each layer of one stage: inputs, squared gradients, ranges (Algorithm 1, 9 to 12).

A stage is recomputed once, in batches of fixed size, and its gradient goes on to the stage before it. Of each row only
some tokens and at most eight heads are kept, since a search looks at no more; ranges are those of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tqdit.calibrate.layers import LayerPlan
from tqdit.models.products import Scores, ValueProduct

MOST_HEADS = 8  # of a row


@dataclass
class Collected:
    """Tensors of one layer over all rows, filled batch by batch: no list is concatenated, so nothing is held twice."""

    rows: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, start: int, values: Tensor) -> None:
        if name not in self.tensors:
            # bfloat16 has the range of float32, and 8 bits are plenty for the weight of an error
            dtype = torch.bfloat16 if name == "g2" else torch.float32
            self.tensors[name] = torch.empty(self.rows, *values.shape[1:], dtype=dtype, device=values.device)
        self.tensors[name][start : start + len(values)] = values


@dataclass(frozen=True)
class Samples:
    """One layer's samples. S tokens of each row, T in all; for a layer without tokens S = T = 1.

    Linear and convolution: left (R, S, K), g2 (R, S, O). Attention: left (R, H, S, K), right (R, H, K, O), g2
    (R, H, S, O), bfloat16, of the H heads that are kept. ranges: smallest and largest value (R,) of each operand over
    all tokens and heads of a row; channels: the same of each input channel of a linear layer, (R, K).
    """

    left: Tensor
    right: Tensor | None
    g2: Tensor
    ranges: dict[str, tuple[Tensor, Tensor]]
    channels: tuple[Tensor, Tensor] | None = None


class Recorder:
    """Collects the samples of some layers while a stage runs."""

    def __init__(
        self, modules: dict[str, nn.Module], plans: tuple[LayerPlan, ...], tokens: Tensor, heads: Tensor
    ) -> None:
        self.modules = {plan.name: modules[plan.name] for plan in plans}
        self.tokens = tokens  # int64 (R, S): which tokens of each row are kept
        self.heads = heads  # int64 (R, H): which heads of each row are kept
        self.collected = {name: Collected(len(tokens)) for name in self.modules}
        self.outputs: dict[str, Tensor] = {}
        self._start = 0

    @contextmanager
    def listen(self, start: int) -> Iterator[None]:
        """Record what runs inside; `start` is the first row of the batch."""
        self._start, self.outputs = start, {}
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()  # a layer that only the timestep reaches: its gradient starts here
            self.outputs[name] = output
            store = self.collected[name]
            operands = [tensor.detach() for tensor in inputs]
            for role, tensor in zip(("left", "right"), operands, strict=False):
                store.put(f"{role}.low", self._start, tensor.flatten(1).amin(1))
                store.put(f"{role}.high", self._start, tensor.flatten(1).amax(1))
            if isinstance(module, nn.Linear):
                tokens = operands[0].reshape(len(operands[0]), -1, operands[0].shape[-1])
                store.put("channel.low", self._start, tokens.amin(1))
                store.put("channel.high", self._start, tokens.amax(1))
            store.put("left", self._start, self._keep(as_matrix(module, operands[0])))
            if isinstance(module, Scores):
                store.put("right", self._start, self._keep_heads(operands[1]).transpose(-2, -1))
            elif isinstance(module, ValueProduct):
                store.put("right", self._start, self._keep_heads(operands[1]))

        return hook

    def gradients(self, gradients: list[Tensor]) -> None:
        """Store the squared gradients of the recorded outputs, in their order."""
        for (name, output), gradient in zip(self.outputs.items(), gradients, strict=True):
            assert gradient.shape == output.shape
            module = self.modules[name]
            matrix = gradient if not isinstance(module, nn.Conv2d) else gradient.flatten(2).transpose(1, 2)
            if matrix.ndim == 2:
                matrix = matrix[:, None]
            if isinstance(module, Scores):
                # samples leave the factor 1 / sqrt(d) of the scores out of the product and put it here
                matrix = matrix * self.collected[name].tensors["left"].shape[-1] ** -0.5
            self.collected[name].put("g2", self._start, self._keep(matrix).square())
        self.outputs = {}  # which hold the graph of the batch

    def _keep(self, matrix: Tensor) -> Tensor:
        """The kept heads and tokens of (N, T, K) or (N, H, T, K); a layer without tokens keeps its one."""
        if matrix.ndim == 4:
            matrix = self._keep_heads(matrix)
        axis = matrix.ndim - 2
        if matrix.shape[axis] == 1:
            return matrix
        index = self.tokens[self._start : self._start + len(matrix)]
        index = index.reshape(len(matrix), *[1] * (axis - 1), index.shape[1], 1)
        return matrix.gather(axis, index.expand(*matrix.shape[:axis], -1, matrix.shape[-1]))

    def _keep_heads(self, x: Tensor) -> Tensor:
        """The kept heads of (N, H, T, K)."""
        index = self.heads[self._start : self._start + len(x)]
        if index.shape[1] == x.shape[1]:
            return x
        return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))

    def samples(self, name: str) -> Samples:
        """Everything of one layer; its memory is handed over."""
        tensors = self.collected.pop(name).tensors
        roles = ("left", "right") if "right" in tensors else ("left",)
        ranges = {role: (tensors[f"{role}.low"], tensors[f"{role}.high"]) for role in roles}
        channels = (tensors["channel.low"], tensors["channel.high"]) if "channel.low" in tensors else None
        return Samples(tensors["left"], tensors.get("right"), tensors["g2"], ranges, channels)


def as_matrix(module: nn.Module, x: Tensor) -> Tensor:
    """An input as rows of tokens: (N, T, K) for linear layers and convolutions, (N, H, T, K) for attention."""
    if isinstance(module, nn.Conv2d):
        size, stride = module.kernel_size, module.stride
        return F.unfold(x, size, stride=stride).transpose(1, 2)
    return x[:, None] if x.ndim == 2 else x


def choose_heads(rows: int, heads: int, seed: int) -> Tensor:
    """Which heads of each row are kept, int64 (R, H): all, or a random subset per row.

    K and V are kept with all their tokens, which for 16 heads is more memory than everything else together.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # apart from the tokens
    return torch.rand(rows, heads, generator=generator).argsort(dim=1)[:, :MOST_HEADS].sort(dim=1).values


def choose_tokens(rows: int, tokens: int, share: float, seed: int) -> Tensor:
    """Which tokens of each row are kept, int64 (R, S): a random subset per row, S = ceil(share T)."""
    generator = torch.Generator().manual_seed(seed)
    kept = max(1, min(tokens, -int(-share * tokens // 1)))
    return torch.rand(rows, tokens, generator=generator).argsort(dim=1)[:, :kept].sort(dim=1).values
