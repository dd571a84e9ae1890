"""The diffusion transformer (DiT, Peebles & Xie, arXiv 2212.09748, section 3.2, adaLN-Zero) in PyTorch.

Submodule names are those of the published checkpoints, so a published state dict loads as it is. Every tensor
that a quantizer may want is the input or the output of a named submodule: `blocks.N.attn.scores`,
`blocks.N.attn.softmax` and `blocks.N.attn.value_product` stand beside the linear layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tqdit.models.folds import Fold, shift_and_scale
from tqdit.models.products import Product, Scores, ValueProduct, find_products
from tqdit.ports import Port, Signature

FREQUENCY_EMBEDDING_SIZE = 256


@dataclass(frozen=True)
class DiTConfig:
    """Shape of one DiT; all but the number of heads can be read off a checkpoint's tensors."""

    input_size: int  # H = W of x, in latent or image pixels
    patch_size: int
    in_channels: int
    out_channels: int  # 2 * in_channels if the variance is learned
    hidden_size: int
    depth: int
    mlp_hidden_size: int
    num_classes: int | None  # rows of the class table except for the last, the null class's; None: there is no table
    num_heads: int

    @property
    def learns_variance(self) -> bool:
        return self.out_channels == 2 * self.in_channels


class PatchEmbed(nn.Module):
    """Images (N, C, H, W) to tokens (N, T, D), T = (H / p) (W / p), by a convolution of stride p."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, T, D)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) in 0..999 to conditioning vectors (N, D): cosines, then sines, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        half = FREQUENCY_EMBEDDING_SIZE // 2
        # The published code computes it in this order. Another one moves the angle at t = 999 by 1e-4.
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", torch.exp(exponent / half), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, config.hidden_size),
            nn.SiLU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, timestep: Tensor) -> Tensor:
        angle = timestep[:, None].to(self.frequencies.dtype) * self.frequencies[None]  # (N, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """Class labels (N,) in 0..num_classes to vectors (N, D); the last label is the null class of guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention with its products and its softmax as submodules."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_size = config.hidden_size // config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.scores = Scores()
        self.softmax = nn.Softmax(dim=-1)
        self.value_product = ValueProduct()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # (N, heads, T, d)
        probabilities = self.softmax(self.scores(q, k))  # (N, heads, T, T)
        attended = self.value_product(probabilities, v).transpose(1, 2).reshape(n, tokens, width)
        return self.proj(attended)


class Mlp(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) (1 + scale (N, D)) + shift (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class DiTBlock(nn.Module):
    """Attention and MLP, each between an adaLN modulation and a gate."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = _norm(width)
        self.attn = Attention(config)
        self.norm2 = _norm(width)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, p = config.hidden_size, config.patch_size
        self.norm_final = _norm(width)
        self.linear = nn.Linear(width, p * p * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p * p * out_channels)


class DiT(nn.Module):
    """(x (N, C, H, W) float, timestep (N,) in 0..999, class_labels (N,)) -> (N, out_channels, H, W).

    The first C channels of the result are the predicted noise, the rest (if learned) the variance fraction v of
    improved DDPM (arXiv 2102.09672, eq. 15). An unconditional network has no class table, or one of a single row, and
    takes no labels.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        if config.num_classes is not None:
            self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.pos_embed = nn.Parameter(sine_cosine_positions(config), requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        c = self.t_embedder(timestep)  # (N, D)
        if self.config.num_classes is not None:
            c = c + self.y_embedder(
                torch.zeros_like(timestep, dtype=torch.int64) if class_labels is None else class_labels
            )
        tokens = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(N, T, p * p * C) -> (N, C, H, W)."""
        p, c = self.config.patch_size, self.config.out_channels
        side = self.config.input_size // p
        grid = tokens.reshape(tokens.shape[0], side, side, p, p, c)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], c, side * p, side * p)


def signature_of(config: DiTConfig) -> Signature:
    """The ports of a DiT; the last class is the null class of guidance."""
    size, null = config.input_size, config.num_classes
    state = Port("x", "state", "float32", (None, config.in_channels, size, size))
    time = Port("timestep", "time", "int64", (None,))
    label = (Port("class_labels", "request", "int64", (None,), null=null, values=null + 1),) if null else ()
    return Signature(
        ports=(state, time, *label),
        output=(None, config.out_channels, size, size),
        family="DiT",
    )


def products_of(network: DiT) -> tuple[Product, ...]:
    """Its products, with the places where divisors of their inputs fold: adaLN's rows, and the rows of v."""
    width = network.config.hidden_size
    folds: dict[str, tuple[Fold, ...]] = {}
    row_blocks: dict[str, int] = {}
    for index in range(network.config.depth):
        block = f"blocks.{index}"
        adaln = f"{block}.adaLN_modulation.1"
        folds[f"{block}.attn.qkv"] = shift_and_scale(adaln, 0, width)
        folds[f"{block}.attn.proj"] = (Fold(f"{block}.attn.qkv", 2 * width, 3 * width),)
        folds[f"{block}.mlp.fc1"] = shift_and_scale(adaln, 3, width)
        row_blocks[f"{block}.attn.qkv"] = 3
    folds["final_layer.linear"] = shift_and_scale("final_layer.adaLN_modulation.1", 0, width)
    example = {name: torch.from_numpy(array) for name, array in signature_of(network.config).zeros(2).items()}
    return find_products(network, example, folds, row_blocks)


def sine_cosine_positions(config: DiTConfig) -> Tensor:
    """Fixed 2-D position embedding (1, T, D): a quarter each of sin and cos of the column, then of the row.

    The one of masked autoencoders (arXiv 2111.06377), which the published DiT takes over.
    """
    side, quarter = config.input_size // config.patch_size, config.hidden_size // 4
    omega = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angle = coordinate.reshape(-1, 1) * omega  # (T, D / 4)
        halves.append(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))
    return torch.from_numpy(np.concatenate(halves, axis=1)).float().unsqueeze(0)


def randomize(model: DiT, seed: int = 0, scale: float = 0.02) -> DiT:
    """Random non-zero weights everywhere, for tests and speed measurements of a model without weights.

    A freshly initialized DiT computes zero (adaLN-Zero), which would hide every mistake.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
