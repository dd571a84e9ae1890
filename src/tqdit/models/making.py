"""Networks that other libraries make of a configuration, which can claim in a few bytes what would never be made."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tqdit.bounds import check_memory
from tqdit.errors import CheckpointError, TqditError
from tqdit.extras import need
from tqdit.models.state import AGAIN, count_tensors, read_json

SPARE = 1000  # parameters that are made and in no file, or made again
MOST_SETTING = 1_000_000  # of a scheduler, such as the steps of its training


@contextmanager
def bounded(folder: Path, root: Path) -> Iterator[None]:
    """In it, diffusers and transformers may make the networks of a directory, with all its subfolders.

    Raises CheckpointError if they make many more parameters than its files hold tensors, or tables of many steps for a
    scheduler, UsageError if tables in a network of diffusers are beyond the memory. Networks that other threads make do
    not count. root: the folder that links must not leave.
    """
    held = count_tensors(folder)
    most, here, made = 4 * held + SPARE, threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == here
        if made > most:
            raise CheckpointError(
                f"{folder}: its configuration makes more than {most} parameters, its files hold {held} tensors. {AGAIN}"
            )

    for file in sorted(folder.rglob("scheduler_config.json")):
        _check_scheduler(file, read_json(file, root))
    hook = register_module_parameter_registration_hook(count)
    try:
        for file in sorted(folder.rglob("config.json")):
            _check_tables(file, read_json(file, root))
        made = 0
        yield
    finally:
        hook.remove()


def _check_scheduler(file: Path, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, int) and value > MOST_SETTING:
            raise CheckpointError(f"{file}: '{name}' is {value}, expected at most {MOST_SETTING}. {AGAIN}")


def _check_tables(file: Path, settings: Mapping[str, Any]) -> None:
    """Make a network of diffusers without memory, to see its tables. What cannot be made so is left to diffusers."""
    diffusers: Any = need("diffusers", "diffusers", "loading a diffusers directory")
    kind: Any = getattr(diffusers, str(settings.get("_class_name")), None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return
    try:
        with torch.device("meta"):
            network = kind.from_config(settings)  # type: ignore[attr-defined]
    except TqditError:
        raise
    except Exception:  # of any kind: diffusers itself says what is wrong
        return
    size = sum(4 * table.numel() * table.element_size() for table in network.buffers())  # they are made in float64
    check_memory(f"{file}: tables that it claims", size, AGAIN)
