"""Adapter for every other transformer of diffusers: a directory, or the network itself, whose calls were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tqdit.errors import CheckpointError, UsageError
from tqdit.extras import need
from tqdit.interface import Interface
from tqdit.models.families import diffusers as dit
from tqdit.models.loaded import LoadedModel, Source, name_of
from tqdit.models.recorded import recorded_model
from tqdit.models.state import check_places

RECORD = (
    "Its inputs are learned from calls: pass --prompts or --rows to tqdit-calibrate, or record a pipeline with "
    "tqdit.record."
)
# Classes that tests/zoo takes through the whole flow; the command traces any other one in a child process.
PROVEN = (
    "AuraFlowTransformer2DModel", "ChromaTransformer2DModel", "CogVideoXTransformer3DModel", "Flux2Transformer2DModel",
    "FluxTransformer2DModel", "HunyuanDiT2DModel", "LTXVideoTransformer3DModel", "Lumina2Transformer2DModel",
    "PixArtTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel",
    "WanTransformer3DModel", "ZImageTransformer2DModel",
)  # fmt: skip


def matches(source: Source) -> bool:
    if isinstance(source, nn.Module):
        return not dit.matches(source)
    return isinstance(source, str) and Path(source).is_dir() and not dit.matches(source)


def load(source: Source, heads: int | None = None) -> LoadedModel:
    raise UsageError(f"{name_of(source)}: a {_kind(source)}. {RECORD}")


def load_recorded(source: Source, interface: Interface) -> LoadedModel:
    """The network with what was learned of its calls. Raises UsageError if it is not of the recorded class."""
    if _kind(source) != interface.signature.family:
        raise UsageError(
            f"{name_of(source)}: a {_kind(source)}; the calls were those of a {interface.signature.family}."
        )
    network = source if isinstance(source, nn.Module) else _read_network(str(source))
    return recorded_model(network, interface, name_of(source), dit.vae_folder(source))


def open_pipeline(folder: str) -> Any:
    """The pipeline of a directory, in float32. Raises CheckpointError if it cannot be loaded."""
    diffusers: Any = need("diffusers", "diffusers", "recording a pipeline")
    return _from_pretrained(diffusers.DiffusionPipeline, Path(folder), Path(folder))


def open_texts(folder: str) -> Any:
    """The pipeline of a directory without its transformer and its VAE, in float32."""
    diffusers: Any = need("diffusers", "diffusers", "exporting text encoders")
    if not (Path(folder) / "model_index.json").is_file():
        raise CheckpointError(f"{folder}: no model_index.json in it. Pass the directory of a pipeline for its texts.")
    return _from_pretrained(diffusers.DiffusionPipeline, Path(folder), Path(folder), transformer=None, vae=None)


def _kind(source: Source) -> str | None:
    return type(source).__name__ if isinstance(source, nn.Module) else dit.class_name(str(source))


def _read_network(source: str) -> nn.Module:
    diffusers: Any = need("diffusers", "diffusers", "loading a diffusers directory")
    name = dit.class_name(source)
    kind = getattr(diffusers, str(name), None)
    if kind is None or not issubclass(kind, nn.Module):
        raise CheckpointError(f"{source}: diffusers {diffusers.__version__} has no '{name}'. Upgrade diffusers.")
    network: nn.Module = _from_pretrained(kind, dit.transformer_folder(source), Path(source))
    return network


def _from_pretrained(kind: Any, folder: Path, root: Path, **parts: None) -> Any:
    """In float32, which is what diffusers makes of every type unless it is told another one."""
    check_places(folder, root)
    _, variant = dit.find_weights(dit.transformer_folder(str(root)))
    try:
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, variant=variant, **parts)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: diffusers cannot load it ({reason}). Get the directory again.") from error
