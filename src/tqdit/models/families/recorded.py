"""Adapter for every other transformer of diffusers: a directory, or the network itself, whose calls were recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tqdit.demo.weights import TEXT, shipped_pipeline
from tqdit.errors import UsageError
from tqdit.interface import Interface
from tqdit.models.directories import class_name, folder_of, open_pipeline, open_transformer, vae_folder
from tqdit.models.families import diffusers as dit
from tqdit.models.loaded import LoadedModel, Source, name_of
from tqdit.models.model_card import read_pipeline_card
from tqdit.models.recorded import RECORD, recorded_model
from tqdit.models.recorder import Recorder


def matches(source: Source) -> bool:
    if isinstance(source, nn.Module):
        return not dit.matches(source)
    return source == TEXT or (isinstance(source, str) and Path(source).is_dir() and not dit.matches(source))


def load(source: Source, heads: int | None = None) -> LoadedModel:
    if source == TEXT:
        return load_recorded(source, _shipped_interface())
    raise UsageError(f"{name_of(source)}: a {_kind(source)}. {RECORD}")


def _shipped_interface() -> Interface:
    """How the text demo's pipeline calls its network, learned of the first two prompts of its card."""
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
    network, weights = open_transformer(folder, in_memory or bool(interface.alike))  # known values are computed
    model = recorded_model(network, interface, str(source), vae_folder(folder), weights)
    proposal = read_pipeline_card(Path(folder)).proposed
    return model if proposal is None else replace(model, proposed=proposal.chain(model.sampling))


def _kind(source: Source) -> str | None:
    return type(source).__name__ if isinstance(source, nn.Module) else class_name(folder_of(str(source)))
