"""Small hand-made networks as loaded models: one property of real transformers each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tqdit.models.loaded import LoadedModel, fingerprint
from tqdit.models.products import find_products
from tqdit.ports import Port, Signature
from tqdit.sampling.process import Flow
from tqdit.sampling.schedule import SamplingSpec

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from tqdit.quantization.table import ScaleTable

CHANNELS, WIDTH = 4, 16


class Tokens(nn.Module):
    """(N, C, T) to tokens of width 16 that depend on the timestep, through `body`, and back."""

    def __init__(self, body: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(CHANNELS, WIDTH), nn.Linear(1, WIDTH)
        self.body, self.out = body, nn.Linear(width, CHANNELS)

    def forward(self, x: Tensor, sigma: Tensor, **requests: Tensor) -> Tensor:
        tokens = self.embed(x.transpose(1, 2)) + self.time(sigma[:, None])[:, None]
        prediction: Tensor = self.out(self.body(tokens, **requests)).transpose(1, 2)
        return prediction


class Convolutions(nn.Module):
    """A video's patches, as Wan's; a gate of convolutions, as Sana's; pairs of tokens, as an audio model's."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.patches = nn.Conv3d(4, 8, (1, 2, 3), (1, 2, 3), bias=False)  # leaves the last column out
        self.expand, self.shrink = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.strided, self.dilated = nn.Conv1d(8, 8, 2), nn.Conv1d(8, 8, 2, 2, dilation=2)
        self.pairs = nn.Conv1d(8, 8, 2, 2)
        self.out = nn.Linear(8, 4 * 2 * 4 * 7 // 4)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = self.patches(x).flatten(2, 3)  # (N, 8, 4, 2)
        h = self.shrink(self.depthwise(self.expand(h)).sigmoid()) + self.time(sigma[:, None])[:, :, None, None]
        h = h.flatten(2)  # (N, 8, 8)
        h = self.pairs(h) + self.dilated(F.pad(h, (0, 1)))[:, :, :4] + self.strided(h)[:, :, :4]
        return self.out(h.transpose(1, 2)).reshape(-1, 4, 2, 4, 7)


class Parallel(nn.Module):
    """Attention and MLP side by side, their results joined in front of one linear layer: Flux's single blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.up = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.proj_out = nn.Linear(5 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = x + self.proj_out(torch.cat([attended, F.gelu(self.up(h), approximate="tanh")], dim=2))
        return result


class Folded(nn.Module):
    """Frames beside the rows, as Latte's, and a text embedder on all words of all rows, as HunyuanDiT's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.words = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(8, WIDTH)
        self.narrow, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        words = F.gelu(self.words(text.flatten(0, 1)), approximate="tanh")  # (N W, D)
        words = self.narrow(words).unflatten(0, (-1, text.shape[1]))
        frames = x.unflatten(1, (2, -1)).flatten(0, 1)  # (N F, T, D)
        q, k, v = self.qkv(frames).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        frames = frames + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        seen = frames.unflatten(0, (-1, 2))  # (N, F, T, D), which attends over frames
        over = F.scaled_dot_product_attention(*[seen.transpose(1, 2)[:, :, None]] * 3)[:, :, 0].transpose(1, 2)
        x = self.wide(seen + over).flatten(1, 2)
        return x + F.scaled_dot_product_attention(x, words, words)


class Shared(nn.Module):
    """One feed-forward layer for two streams, as CogView4's, for a vector of each row and for a grid of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.vector = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        row = self.vector(self.feed(x.mean(1)))  # (N, D)
        x = x + self.feed(x) + row[:, None]  # (N, T, D)
        x = x + self.feed(words.mean(1, keepdim=True) + words[:, :3]).mean(1, keepdim=True)
        return x + self.feed(x.unflatten(1, (2, 3))).flatten(1, 2)  # (N, 2, 3, D)

    def feed(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return result


def described(network: nn.Module, state: tuple[int, ...], *requests: Port) -> LoadedModel:
    """A network of a state `x` and a float timestep `sigma` in 0..1."""
    network = network.eval().requires_grad_(False)
    ports = (Port("x", "state", "float32", (None, *state)), Port("sigma", "time", "float32", (None,)), *requests)
    signature = Signature(ports, (None, *state), type(network).__name__)
    example = {name: torch.from_numpy(array) for name, array in signature.zeros(2).items()}
    return LoadedModel(
        network=network, signature=signature, products=find_products(network, example),
        sampling=SamplingSpec(Flow(time_scale=1.0), "euler", 10), guidance=None, latents=None, origin="toy",
        source="toy", fingerprint=fingerprint(network, "toy"),
    )  # fmt: skip


def run_graph(graph: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What ONNX Runtime computes without optimisations."""
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(graph).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def without_sites(table: ScaleTable, *modules: str) -> ScaleTable:
    from dataclasses import replace

    return replace(table, sites=tuple(site for site in table.sites if site.module not in modules))
