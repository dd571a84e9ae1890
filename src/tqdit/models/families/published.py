"""Adapter for checkpoints in the layout of facebookresearch/DiT: one `.pt` or `.safetensors` file.

Width, depth, patch, classes, channels and image size are read off the tensors' shapes; the number of heads is that of
the published family (S, B, L, XL) or given. Guiding three of four channels is a known slip of the published code
(sample.py), kept because the published numbers contain it.
"""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tqdit.card import Latents
from tqdit.errors import CheckpointError
from tqdit.models.dit import FREQUENCY_EMBEDDING_SIZE, DiT, DiTConfig, products_of, signature_of
from tqdit.models.loaded import LoadedModel, fingerprint
from tqdit.models.state import StateDict, check_layout, read_metadata, read_tensors
from tqdit.models.vae import LATENT_SCALE
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
FAMILY_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # hidden size -> heads of DiT-S, B, L and XL


@dataclass(frozen=True)
class Origin:
    """How checkpoints of one origin are sampled by the code that they come from."""

    name: str
    guidance: Guidance
    latents: Latents | None


PUBLISHED = Origin("published", Guidance(1.5, channels=3), Latents(LATENT_SCALE))
DEMO = Origin("demo", Guidance(1.5), None)


@dataclass(frozen=True)
class OwnFacts:
    """What a safetensors file that TQDiT wrote says of itself, beyond its tensors."""

    num_heads: int | None = None
    class_names: tuple[str, ...] = ()  # only models of our own training have them


def matches(source: str) -> bool:
    return Path(source).suffix in SUFFIXES and not Path(source).is_dir()


def load(source: str, heads: int | None = None) -> LoadedModel:
    path = Path(source)
    tensors, facts = read_tensors(path), read_own_facts(path)
    origin = DEMO if facts.class_names else PUBLISHED
    return build(path, tensors, facts.num_heads if heads is None else heads, origin, facts.class_names)


def build(
    path: Path, tensors: StateDict, heads: int | None, origin: Origin, class_names: tuple[str, ...] = ()
) -> LoadedModel:
    """A model from a state dict with published names."""
    config = infer_config(path, tensors, heads)
    if class_names and len(class_names) != config.num_classes:
        raise CheckpointError(
            f"{path}: its metadata names {len(class_names)} classes, its label table has {config.num_classes} "
            "(and the null class). Get the file again."
        )
    return describe(assemble(path, tensors, config), str(path), origin, class_names)


def describe(network: DiT, source: str, origin: Origin, class_names: tuple[str, ...] = ()) -> LoadedModel:
    """A native DiT as the stages take it: 250 steps of DDPM on round(linspace(0, 999, T)) (diffusion/respace.py)."""
    config = network.config
    return LoadedModel(
        network=network,
        signature=signature_of(config),
        products=products_of(network),
        sampling=SamplingSpec(Diffusion(learned_variance=config.learns_variance), "ddpm", 250),
        guidance=origin.guidance,
        latents=origin.latents,
        origin=origin.name,
        source=source,
        fingerprint=fingerprint(network, config),
        class_names=class_names,
    )


def assemble(path: Path, tensors: StateDict, config: DiTConfig) -> DiT:
    """The network of `config` with these weights in float32 and eval mode; weights that are float32 are not copied."""
    _check_sizes(path, config)
    with torch.device("meta"):
        network = DiT(config)
    check_layout(path, tensors, network.state_dict())
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    network.eval().requires_grad_(False)
    return network


def infer_config(path: Path, tensors: StateDict, heads: int | None) -> DiTConfig:
    """The configuration that the shapes of published tensors tell."""
    width, in_channels, patch, _ = _shape(path, tensors, "x_embedder.proj.weight", 4)
    _, tokens, _ = _shape(path, tensors, "pos_embed", 3)
    rows, _ = _shape(path, tensors, "final_layer.linear.weight", 2)
    classes, _ = _shape(path, tensors, "y_embedder.embedding_table.weight", 2)
    mlp_width, _ = _shape(path, tensors, "blocks.0.mlp.fc1.weight", 2)
    frequencies = _shape(path, tensors, "t_embedder.mlp.0.weight", 2)[1]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    side = math.isqrt(tokens)
    if side * side != tokens or rows % (patch * patch) or frequencies != FREQUENCY_EMBEDDING_SIZE:
        raise CheckpointError(
            f"{path}: {tokens} tokens, {rows} outputs per token of {patch}x{patch} pixels and {frequencies} timestep "
            f"frequencies are not a DiT's; expected a square number, a multiple of {patch * patch} and "
            f"{FREQUENCY_EMBEDDING_SIZE}. Pass a DiT checkpoint."
        )
    return DiTConfig(
        input_size=side * patch, patch_size=patch, in_channels=in_channels, out_channels=rows // patch**2,
        hidden_size=width, depth=depth, mlp_hidden_size=mlp_width, num_classes=classes - 1,
        num_heads=choose_heads(path, width, heads),
    )  # fmt: skip


def _check_sizes(path: Path, config: DiTConfig) -> None:
    """Sizes that no DiT has: what is built from them would fail later, or compute nonsense."""
    c, size, patch = config.in_channels, config.input_size, config.patch_size
    channels = f"{config.out_channels} channels come out of {c}, expected {c} or {2 * c}"
    for wrong, text in (
        (size % patch, f"images of {size}x{size} cannot be cut into patches of {patch}x{patch}"),
        (config.hidden_size % 4, f"width {config.hidden_size} is not a multiple of 4, which its positions need"),
        (config.out_channels not in (c, 2 * c), channels),
        (config.num_classes < 1, "its label table holds one row, expected the classes and the null class"),
    ):
        if wrong:
            raise CheckpointError(f"{path}: {text}. Pass a DiT checkpoint.")


def choose_heads(path: Path, width: int, heads: int | None) -> int:
    chosen = FAMILY_HEADS.get(width) if heads is None else heads
    if chosen is None:
        raise CheckpointError(
            f"{path}: width {width} is not of the published family {sorted(FAMILY_HEADS)}, so the number of heads is "
            "not known. Pass --heads."
        )
    if chosen < 1 or width % chosen:
        raise CheckpointError(f"{path}: width {width} cannot be split into {chosen} heads. Pass another --heads.")
    return chosen


def read_own_facts(path: Path) -> OwnFacts:
    """What TQDiT wrote into the metadata of a safetensors file; nothing for files of other origin."""
    text = read_metadata(path).get("tqdit") if path.suffix == ".safetensors" else None
    if text is None:
        return OwnFacts()
    try:
        facts = json.loads(text)
        return OwnFacts(operator.index(facts["num_heads"]), tuple(facts.get("classes", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its 'tqdit' metadata is damaged ({error!r}). Get the file again.") from error


def _shape(path: Path, tensors: dict[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        found = ", ".join(f"'{key}'" for key in sorted(tensors)[:4])
        raise CheckpointError(
            f"{path}: not a DiT in the published layout: missing '{name}'; it holds {len(tensors)} tensors, among "
            f"them unexpected {found}. Pass a published DiT checkpoint or a diffusers DiTTransformer2DModel directory."
        )
    if tensors[name].ndim != rank:
        raise CheckpointError(
            f"{path}: '{name}' has {tensors[name].ndim} dimensions, a DiT's has {rank}. Pass a DiT checkpoint."
        )
    if tensors[name].numel() == 0:
        shape = tuple(tensors[name].shape)
        raise CheckpointError(f"{path}: '{name}' of shape {shape} is empty. Pass a DiT checkpoint.")
    return tuple(tensors[name].shape)
