"""Directories as diffusers writes them, of a pipeline or of a transformer alone: their parts, and opening them."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.demo.weights import TEXT, shipped_pipeline
from tqdit.errors import CheckpointError, TqditError, first_line
from tqdit.extras import need
from tqdit.models.encoders import open_encoders
from tqdit.models.loaded import Source
from tqdit.models.making import bounded
from tqdit.models.state import check_places, is_finite, read_json
from tqdit.models.weights import IN_MEMORY, Weights, open_network

INDEX = "model_index.json"
MOST_LOADED = 1_000_000_000  # bytes of weights; a larger pipeline reads them from its files while it runs
OWN_CODE = "Only classes of diffusers and transformers are loaded; open it yourself and use tqdit.record."
# The names that save_pretrained gives to weights; the dotted word in front of or behind is a variant such as fp16.
WEIGHT_FILE = re.compile(r"diffusion_pytorch_model(\.[^.-]+)?\.(safetensors|bin)(\.index(\.[^.-]+)?\.json)?")


def folder_of(source: str) -> str:
    """The directory that MODEL names: that of the text demo, or itself."""
    return str(shipped_pipeline()) if source == TEXT else source


def transformer_folder(source: str) -> Path:
    """Of a pipeline directory; a transformer's own directory itself."""
    root = Path(source)
    return root / "transformer" if (root / INDEX).is_file() else root


def vae_folder(source: Source) -> Path | None:
    """Of a pipeline directory; None if it has none, or is no directory."""
    folder = Path(source) / "vae" if isinstance(source, str) else None
    return folder if folder and (folder / "config.json").is_file() else None


def class_name(source: str) -> str | None:
    """Of the transformer in a directory; None if its configuration is missing or not readable."""
    try:
        name = read_json(transformer_folder(source) / "config.json", Path(source)).get("_class_name")
    except CheckpointError:
        return None
    return None if name is None else str(name)


def find_weights(folder: Path) -> tuple[Path, str | None]:
    """The weights in a directory, or their index, and their variant: None, if there are weights without one."""
    found = [match for file in folder.glob("*") if (match := WEIGHT_FILE.fullmatch(file.name))]
    variants = sorted({match[1] or match[4] or "" for match in found})
    if not found:
        raise CheckpointError(
            f"{folder}: found none of diffusion_pytorch_model.safetensors, diffusion_pytorch_model.bin (or their "
            ".index.json). Download the weights too."
        )
    if variants[0] and len(variants) > 1:
        raise CheckpointError(
            f"{folder}: holds the variants {', '.join(variant[1:] for variant in variants)}, expected one. Remove the "
            "others."
        )
    chosen = [match for match in found if (match[1] or match[4] or "") == variants[0]]
    best = min(chosen, key=lambda match: (match[2] == "bin", match[3] is None))
    return folder / best[0], variants[0][1:] or None


def check_pipeline(source: str) -> Path:
    """The directory of a pipeline. Raises CheckpointError for any other, such as a transformer's alone."""
    folder = Path(folder_of(source))
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder}: no {INDEX} in it. Pass the directory of a whole pipeline.")
    if b'"transformers"' in index.read_bytes():
        need("transformers", "diffusers", "a pipeline of text")
    return folder


def open_pipeline(folder: str) -> Any:
    """The pipeline of a directory, in float32. Raises CheckpointError if it cannot be loaded."""
    diffusers: Any = need("diffusers", "diffusers", "recording a pipeline")
    root = check_pipeline(folder)
    return from_pretrained(diffusers.DiffusionPipeline, root, root)


def open_for_prompts(folder: str) -> tuple[Any, Weights]:
    """The pipeline of a directory, in float32. If it is large, large weights of its transformer and its text encoders
    stay in their files: it runs inside `Weights.lent`.
    """
    root = Path(folder_of(folder))
    size = sum(file.stat().st_size for file in root.rglob("*.safetensors"))
    if size <= MOST_LOADED or not (root / "transformer").is_dir():  # the recorder says what it has in its place
        return open_pipeline(folder), IN_MEMORY
    diffusers: Any = need("diffusers", "diffusers", "recording a pipeline")
    check_pipeline(folder)
    network, weights = open_transformer(str(root), in_memory=False)
    encoders, of_encoders = _open_encoders(root)
    pipeline = from_pretrained(diffusers.DiffusionPipeline, root, root, transformer=network, **encoders)
    return pipeline, Weights({**weights.made, **of_encoders.made})


def open_texts(folder: str) -> tuple[Any, Weights]:
    """The pipeline of a directory without its transformer and its VAE; large weights of text encoders stay in files."""
    diffusers: Any = need("diffusers", "diffusers", "exporting text encoders")
    root = check_pipeline(folder)
    encoders, weights = _open_encoders(root)
    return from_pretrained(diffusers.DiffusionPipeline, root, root, transformer=None, vae=None, **encoders), weights


def _open_encoders(root: Path) -> tuple[dict[str, nn.Module], Weights]:
    check_places(root, root)
    with _without_bars(), bounded(root, root):
        return open_encoders(root, read_json(root / INDEX), find_weights(transformer_folder(str(root)))[1])


def open_transformer(source: str, in_memory: bool) -> tuple[nn.Module, Weights]:
    """That of a directory, in float32. Unless `in_memory`, large weights stay in their files if they can: it runs
    inside `Weights.lent`.
    """
    diffusers: Any = need("diffusers", "diffusers", "loading a diffusers directory")
    name = class_name(source)
    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise CheckpointError(f"{source}: diffusers {diffusers.__version__} has no '{name}'. Upgrade diffusers.")
    folder = transformer_folder(source)
    if not in_memory:
        check_places(folder, Path(source))
        weights, settings = find_weights(folder)[0], read_json(folder / "config.json", Path(source))
        with bounded(folder, Path(source)):
            found = open_network(kind, weights, settings)
        if found is not None:
            return found
    return from_pretrained(kind, folder, Path(source)), IN_MEMORY


def from_pretrained(kind: Any, folder: Path, root: Path, **parts: nn.Module | None) -> Any:
    """In float32. Text encoders have the type that their configuration names unless another one is asked for.

    parts: of a pipeline, in place of those in its directory.
    """
    check_places(folder, root)
    if (folder / INDEX).is_file():
        _check_index(folder / INDEX)
    _, variant = find_weights(transformer_folder(str(root)))
    try:
        with _without_bars(), bounded(folder, root), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions call torch_dtype dtype
            made = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, variant=variant, torch_dtype=torch.float32, **parts
            )
    except TqditError:
        raise
    except Exception as error:  # its parts are of several libraries, which raise errors of all kinds
        raise CheckpointError(
            f"{folder}: diffusers cannot load it ({first_line(error)}). Get the directory again."
        ) from error
    for part, network in (getattr(made, "components", None) or {"": made}).items():
        if isinstance(network, nn.Module) and part not in parts:
            _check_weights(folder / part, network)
    return made


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
