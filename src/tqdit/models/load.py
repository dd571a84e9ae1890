"""Loading a model by what the user wrote."""

from __future__ import annotations

from pathlib import Path

from tqdit.errors import CheckpointError
from tqdit.models import families
from tqdit.models.loaded import LoadedModel
from tqdit.models.scratch import need_compiler
from tqdit.registry import find_modules

KNOWN = "Pass 'demo', a DiT checkpoint (.pt, .safetensors) or a diffusers directory."


def load_model(source: str | Path, heads: int | None = None) -> LoadedModel:
    """Load `demo`, a published DiT checkpoint (`.pt`, `.safetensors`) or a diffusers directory.

    heads: attention heads of a checkpoint that does not tell them. Raises CheckpointError with one line that names the
    file and what is wrong with it, and OutputError if PyTorch finds no folder for temporary files.
    """
    text = str(source)
    for family in find_modules(families).values():
        if family.matches(text):
            need_compiler()
            model: LoadedModel = family.load(text, heads)
            return model
    if not Path(text).exists():
        raise CheckpointError(f"{text}: no such file or directory. {KNOWN}")
    raise CheckpointError(f"{text}: unsupported file type '{Path(text).suffix or 'without a suffix'}'. {KNOWN}")
