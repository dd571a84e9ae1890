"""Adapter for networks in the layout of facebookresearch/DiT: a checkpoint, a state dict or a network in memory.

Width, depth, patch, classes, channels and image size are read off the tensors' shapes; the number of heads is that of
the published family (S, B, L, XL), of the network in memory, or given. Guiding three of four channels is a known slip
of the published code (sample.py), kept because the published numbers contain it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tqdit.card import Latents
from tqdit.errors import CheckpointError
from tqdit.models.dit import FREQUENCY_EMBEDDING_SIZE, DiT, DiTConfig, products_of, signature_of
from tqdit.models.loaded import LoadedModel, Source, fingerprint, name_of
from tqdit.models.products import prediction_of
from tqdit.models.state import WEIGHT_SUFFIXES, find_network, flatten, load_weights, read_tensors, unwrap
from tqdit.models.vae import LATENT_CHANNELS, LATENT_SCALE
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

FAMILY_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # hidden size -> heads of DiT-S, B, L and XL
CLASSES = 1000  # of ImageNet: the published class tables have one row more
ANCHOR = "x_embedder.proj.weight"  # a tensor that every network of this layout has


def matches(source: Source) -> bool:
    if isinstance(source, str):
        return source.endswith((*WEIGHT_SUFFIXES, ".index.json")) and not Path(source).is_dir()
    if isinstance(source, nn.Module):
        return any(f".{name}".endswith(f".{ANCHOR}") for name in source.state_dict())
    return isinstance(source, Mapping)


def load(source: Source, heads: int | None = None) -> LoadedModel:
    name = name_of(source)
    if isinstance(source, str):
        return build(name, read_tensors(Path(source)), heads)
    if not isinstance(source, nn.Module):
        return build(name, flatten(source), heads)
    theirs = unwrap(source, ANCHOR)
    known = (getattr(module, "num_heads", None) for module in theirs.modules())
    model = build(name, theirs.state_dict(), heads or next((n for n in known if isinstance(n, int)), None))
    if type(theirs) is not DiT:
        _check_same(model, theirs)
    return model


def build(source: str, tensors: Mapping[str, Tensor], heads: int | None = None) -> LoadedModel:
    """A model from a state dict with published names."""
    found = find_network(source, tensors, ANCHOR)
    config = infer_config(source, found, heads)
    _check_sizes(source, config)
    with torch.device("meta"):
        network = DiT(config)
    load_weights(source, network, found)
    return describe(network, source)


def _check_same(model: LoadedModel, theirs: nn.Module) -> None:
    """Refuse a network that has the names and shapes of a DiT, and computes something else.

    A copy of it is called, with the model's weights: there is no second copy of these, and the caller's stays as it is.
    """
    ours = model.network.state_dict()
    memo: dict[int, Any] = {id(buffer): buffer.detach().to("cpu") for buffer in theirs.buffers()}
    memo |= {id(tensor): ours[name] for name, tensor in theirs.state_dict(keep_vars=True).items()}
    label = (torch.tensor([0, 0]),) if "y_embedder.embedding_table.weight" in ours else ()
    x = torch.randn(2, *model.signature.state.row_shape, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.tensor([20, 900]), *label)
    try:
        with torch.no_grad():
            found = prediction_of(copy.deepcopy(theirs, memo).eval()(*inputs))
            expected = model.network(*inputs)
            error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    except Exception as reason:  # the network is the caller's, and may fail with any class
        raise CheckpointError(
            f"{model.source}: cannot be called with (x, timestep, class_labels): {reason}. Pass its state dict if it "
            "computes what a published DiT does."
        ) from reason
    if not error < 1e-3:
        raise CheckpointError(
            f"{model.source}: has the tensors of a published DiT, but its prediction is {error:.1%} off. "
            "Pass a network that computes what a published DiT does."
        )


def describe(network: DiT, source: str) -> LoadedModel:
    """A native DiT as the stages take it: 250 steps of DDPM on round(linspace(0, 999, T)) (diffusion/respace.py)."""
    config = network.config
    channels, classes = config.in_channels, config.num_classes
    assumed = {}
    if channels != LATENT_CHANNELS:
        assumed["space"] = f"its {channels} channels are taken for " + ("pixels" if channels in (1, 3) else "latents")
    if classes and classes != CLASSES:
        assumed["num_classes"] = (
            f"the last of the {classes + 1} rows of its class table is taken for the null class of guidance, which a "
            "network trained without label dropout does not have"
        )
    return LoadedModel(
        network=network,
        signature=signature_of(config),
        products=products_of(network),
        sampling=SamplingSpec(Diffusion(learned_variance=config.learns_variance), "ddpm", 250),
        guidance=Guidance(1.5, channels=3 if channels == LATENT_CHANNELS else None) if classes else None,
        latents=None if channels in (1, 3) else Latents(LATENT_SCALE),
        origin="published",
        source=source,
        fingerprint=fingerprint(network, config),
        assumed=assumed,
    )


def infer_config(source: str, tensors: Mapping[str, Tensor], heads: int | None) -> DiTConfig:
    """The configuration that the shapes of published tensors tell."""
    width, in_channels, patch, _ = _shape(source, tensors, "x_embedder.proj.weight", 4)
    _, tokens, _ = _shape(source, tensors, "pos_embed", 3)
    rows, _ = _shape(source, tensors, "final_layer.linear.weight", 2)
    has_classes = (table := "y_embedder.embedding_table.weight") in tensors
    mlp_width, _ = _shape(source, tensors, "blocks.0.mlp.fc1.weight", 2)
    frequencies = _shape(source, tensors, "t_embedder.mlp.0.weight", 2)[1]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    side = math.isqrt(tokens)
    if side * side != tokens or rows % (patch * patch) or frequencies != FREQUENCY_EMBEDDING_SIZE:
        raise CheckpointError(
            f"{source}: {tokens} tokens, {rows} outputs per token of {patch}x{patch} pixels and {frequencies} timestep "
            f"frequencies are not a DiT's; expected a square number, a multiple of {patch * patch} and "
            f"{FREQUENCY_EMBEDDING_SIZE}. Pass a DiT checkpoint."
        )
    return DiTConfig(
        input_size=side * patch, patch_size=patch, in_channels=in_channels, out_channels=rows // patch**2,
        hidden_size=width, depth=depth, mlp_hidden_size=mlp_width, num_heads=choose_heads(source, width, heads),
        num_classes=_shape(source, tensors, table, 2)[0] - 1 if has_classes else None,
    )  # fmt: skip


def _check_sizes(source: str, config: DiTConfig) -> None:
    """Sizes that no DiT has: what is built from them would fail later, or compute nonsense."""
    c, size, patch = config.in_channels, config.input_size, config.patch_size
    channels = f"{config.out_channels} channels come out of {c}, expected {c} or {2 * c}"
    for wrong, text in (
        (size % patch, f"images of {size}x{size} cannot be cut into patches of {patch}x{patch}"),
        (config.hidden_size % 4, f"width {config.hidden_size} is not a multiple of 4, which its positions need"),
        (config.out_channels not in (c, 2 * c), channels),
    ):
        if wrong:
            raise CheckpointError(f"{source}: {text}. Pass a DiT checkpoint.")


def choose_heads(source: str, width: int, heads: int | None) -> int:
    chosen = FAMILY_HEADS.get(width) if heads is None else heads
    if chosen is None:
        raise CheckpointError(
            f"{source}: width {width} is not of the published family {sorted(FAMILY_HEADS)}, so the number of heads is "
            "not known. Pass --heads, or tell 'heads' in a model card."
        )
    if chosen < 1 or width % chosen:
        raise CheckpointError(f"{source}: width {width} cannot be split into {chosen} heads. Correct the heads.")
    return chosen


def _shape(source: str, tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        found = ", ".join(f"'{key}'" for key in sorted(tensors)[:4])
        raise CheckpointError(
            f"{source}: not a DiT in the published layout: missing '{name}'; it holds {len(tensors)} tensors, among "
            f"them unexpected {found}. Pass a published DiT checkpoint or a diffusers DiTTransformer2DModel directory."
        )
    if tensors[name].ndim != rank:
        raise CheckpointError(
            f"{source}: '{name}' has {tensors[name].ndim} dimensions, a DiT's has {rank}. Pass a DiT checkpoint."
        )
    if tensors[name].numel() == 0:
        shape = tuple(tensors[name].shape)
        raise CheckpointError(f"{source}: '{name}' of shape {shape} is empty. Pass a DiT checkpoint.")
    return tuple(tensors[name].shape)
