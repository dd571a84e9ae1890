"""Loading a model by what the user wrote, or from memory."""

from __future__ import annotations

import warnings
from pathlib import Path

from tqdit.errors import CheckpointError, TqditWarning, UsageError
from tqdit.interface import Interface
from tqdit.models import families
from tqdit.models.families import recorded
from tqdit.models.loaded import LoadedModel, Source, name_of
from tqdit.models.model_card import ModelCard, card_path, read_model_card
from tqdit.models.scratch import need_compiler
from tqdit.registry import find_modules

KNOWN = "Pass 'demo', 'text', a DiT checkpoint (.pt, .safetensors) or a diffusers directory."


def needs_calls(source: Source) -> bool:
    """Whether the inputs of the network that `source` names are learned from recorded calls."""
    return recorded.matches(source)


def load_model(
    source: Source | Path, heads: int | None = None, card: ModelCard | None = None, interface: Interface | None = None,
    in_memory: bool = True,
) -> LoadedModel:  # fmt: skip
    """Load `demo`, a DiT checkpoint (`.pt`, `.safetensors`), a diffusers directory, a network or a state dict.

    interface: what was learned of the calls of a network of any other class (`models.recorder`).
    heads: attention heads of a checkpoint that does not tell them. card: facts of the model; None: those of the JSON
    file beside it. A network in memory stays as it is, and shares its weights with the model.
    in_memory: False leaves large weights of a recorded network in their file if possible, to be read when needed.
    Raises CheckpointError with one line that names the file and what is wrong with it, and OutputError if PyTorch finds
    no folder for temporary files. Warns (`TqditWarning`) of what neither tensors nor card tell.
    """
    source = str(source) if isinstance(source, Path) else source
    if interface is not None:
        need_compiler()
        return recorded.load_recorded(source, interface, in_memory)
    for family in find_modules(families).values():
        if family.matches(source):
            need_compiler()
            path = card_path(Path(source)) if isinstance(source, str) else None
            card = card or getattr(family, "CARD", None) or (path and read_model_card(path)) or ModelCard()
            model: LoadedModel = family.load(source, card.heads if heads is None else heads)
            for fact in sorted(set(model.assumed) - card.told):
                place = "a ModelCard" if path is None else f"'{path}'"
                text = f"{name_of(source)}: {model.assumed[fact]}. Say what is right as '{fact}' in {place}."
                warnings.warn(text, TqditWarning, stacklevel=2)
            return card.apply(model)
    text = name_of(source)
    if not isinstance(source, str):
        raise UsageError(f"{text}: not a model. {KNOWN[:-1]}, a network or a state dict.")
    if not Path(text).exists():
        raise CheckpointError(f"{text}: no such file or directory. {KNOWN}")
    raise CheckpointError(f"{text}: unsupported file type '{Path(text).suffix or 'without a suffix'}'. {KNOWN}")
