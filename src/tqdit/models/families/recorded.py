"""Adapter for every other transformer of diffusers: a directory, or the network itself, whose calls were recorded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.demo.weights import TEXT, shipped_pipeline
from tqdit.errors import CheckpointError, TqditError, UsageError, first_line
from tqdit.extras import need
from tqdit.interface import Interface
from tqdit.models.families import diffusers as dit
from tqdit.models.loaded import LoadedModel, Source, name_of
from tqdit.models.making import bounded
from tqdit.models.model_card import read_pipeline_card
from tqdit.models.recorded import recorded_model
from tqdit.models.state import check_places, is_finite, read_json
from tqdit.models.weights import IN_MEMORY, Weights, open_network

RECORD = (
    "Its inputs are learned from calls: pass --prompts or --rows to tqdit-calibrate, --rows to tqdit-export, or record "
    "a pipeline with tqdit.record."
)
INDEX = "model_index.json"
OWN_CODE = "Only classes of diffusers and transformers are loaded; open it yourself and use tqdit.record."
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
    return source == TEXT or (isinstance(source, str) and Path(source).is_dir() and not dit.matches(source))


def folder_of(source: str) -> str:
    """The directory that MODEL names: that of the text demo, or itself."""
    return str(shipped_pipeline()) if source == TEXT else source


def load(source: Source, heads: int | None = None) -> LoadedModel:
    if source == TEXT:
        return load_recorded(source, _shipped_interface())
    raise UsageError(f"{name_of(source)}: a {_kind(source)}. {RECORD}")


def _shipped_interface() -> Interface:
    """How the text demo's pipeline calls its network, learned of the first two prompts of its card."""
    from tqdit.models.recorder import Recorder  # which imports this package's loaders

    pipeline, card = open_pipeline(TEXT), read_pipeline_card(shipped_pipeline())
    pipeline.set_progress_bar_config(disable=True)
    with Recorder(pipeline) as recorder:
        for number, prompt in enumerate(card.prompts[:2]):
            pipeline(prompt, generator=torch.Generator().manual_seed(number), output_type="np", **card.call)
    return recorder.recording().interface


def load_recorded(source: Source, interface: Interface, in_memory: bool = True) -> LoadedModel:
    """The network with what was learned of its calls; in_memory: as in `load_model`.

    Raises UsageError if it is not of the recorded class.
    """
    if not isinstance(source, str | nn.Module):
        raise UsageError(f"{name_of(source)}: not a network. Pass pipeline.transformer, or a directory.")
    if _kind(source) != interface.signature.family:
        raise UsageError(
            f"{name_of(source)}: a {_kind(source)}; the calls were those of a {interface.signature.family}."
        )
    if isinstance(source, nn.Module):
        return recorded_model(source, interface, name_of(source))
    folder = folder_of(str(source))
    network, weights = _read_network(folder, in_memory or bool(interface.alike))  # known values are computed
    return recorded_model(network, interface, str(source), dit.vae_folder(folder), weights)


def open_pipeline(folder: str) -> Any:
    """The pipeline of a directory, in float32. Raises CheckpointError if it cannot be loaded."""
    diffusers: Any = need("diffusers", "diffusers", "recording a pipeline")
    root = check_pipeline(folder)
    return _from_pretrained(diffusers.DiffusionPipeline, root, root)


def open_texts(folder: str) -> Any:
    """The pipeline of a directory without its transformer and its VAE, in float32."""
    diffusers: Any = need("diffusers", "diffusers", "exporting text encoders")
    root = check_pipeline(folder)
    return _from_pretrained(diffusers.DiffusionPipeline, root, root, transformer=None, vae=None)


def check_pipeline(source: str) -> Path:
    """The directory of a pipeline. Raises CheckpointError for any other, such as a transformer's alone."""
    folder = Path(folder_of(source))
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder}: no {INDEX} in it. Pass the directory of a whole pipeline.")
    if b'"transformers"' in index.read_bytes():
        need("transformers", "diffusers", "a pipeline of text")
    return folder


def _kind(source: Source) -> str | None:
    return type(source).__name__ if isinstance(source, nn.Module) else dit.class_name(folder_of(str(source)))


def _read_network(source: str, in_memory: bool) -> tuple[nn.Module, Weights]:
    diffusers: Any = need("diffusers", "diffusers", "loading a diffusers directory")
    name = dit.class_name(source)
    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise CheckpointError(f"{source}: diffusers {diffusers.__version__} has no '{name}'. Upgrade diffusers.")
    folder = dit.transformer_folder(source)
    if not in_memory:
        check_places(folder, Path(source))
        weights, settings = dit.find_weights(folder)[0], read_json(folder / "config.json", Path(source))
        with bounded(folder, Path(source)):
            found = open_network(kind, weights, settings)
        if found is not None:
            return found
    return _from_pretrained(kind, folder, Path(source)), IN_MEMORY


@contextmanager
def _without_bars() -> Iterator[None]:
    """Progress bars of the libraries that load are not ours to show, in a quiet command least of all."""
    names = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name)]
    logs: list[Any] = [importlib.import_module(f"{name}.utils.logging") for name in names]
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def _from_pretrained(kind: Any, folder: Path, root: Path, **parts: None) -> Any:
    """In float32, which is what diffusers makes of every type unless it is told another one."""
    check_places(folder, root)
    if (folder / INDEX).is_file():
        _check_index(folder / INDEX)
    _, variant = dit.find_weights(dit.transformer_folder(str(root)))
    try:
        with _without_bars(), bounded(folder, root):
            made = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, variant=variant, **parts)
    except TqditError:
        raise
    except Exception as error:  # its parts are of several libraries, which raise errors of all kinds
        raise CheckpointError(
            f"{folder}: diffusers cannot load it ({first_line(error)}). Get the directory again."
        ) from error
    for part, network in (getattr(made, "components", None) or {"": made}).items():
        if isinstance(network, nn.Module):
            _check_weights(folder / part, network)
    return made


def _check_weights(folder: Path, network: nn.Module) -> None:
    """Refuse a network with weights that no file gave a value, or a value that is no number."""
    for name, tensor in network.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(f"{folder}: its files lack '{name}'. Get the directory again.")
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(f"{folder}: '{name}' holds NaN or infinite values. Get the directory again.")


def _check_index(path: Path) -> None:
    """Refuse parts that are not of diffusers or transformers: some versions of diffusers import what an index names."""
    pipelines: Any = need("diffusers", "diffusers", "loading a diffusers directory").pipelines
    for name, value in read_json(path).items():
        if name == "_class_name" and not isinstance(value, str):
            raise CheckpointError(f"{path}: the pipeline is of '{value}', whose code would run. {OWN_CODE}")
        library = value[0] if isinstance(value, list) and value else None
        if library in (None, "diffusers", "transformers"):
            continue
        ours = isinstance(library, str) and library.isidentifier() and hasattr(pipelines, library)
        if not ours or (path.parent / name / f"{library}.py").exists():
            raise CheckpointError(f"{path}: '{name}' is of '{library}', whose code would run. {OWN_CODE}")
