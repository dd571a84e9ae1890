"""Reading tensors from files that somebody else wrote: safely, completely, with one clear line when it fails."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tqdit.errors import CheckpointError
from tqdit.files import JSON, SAFETENSORS, TORCH, reading

StateDict = dict[str, Tensor]
AGAIN = "Get it again."
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path) -> StateDict:
    """All tensors of a `.safetensors`, `.pt`, `.pth` or `.bin` file, on the CPU. Nothing is ever unpickled."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Pass a checkpoint, a diffusers directory or 'demo'.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def read_sharded(index_file: Path) -> StateDict:
    """All tensors of a sharded checkpoint, `*.index.json` beside its shards."""
    index = read_json(index_file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index_file}: no 'weight_map' of tensor names to shards. Download it again.")
    tensors: StateDict = {}
    for shard in sorted(set(weight_map.values())):
        if not shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{index_file}: shard '{shard}' lies outside its folder, expected a plain file name. Download it again."
            )
        if not (index_file.parent / shard).is_file():
            raise CheckpointError(
                f"{index_file.parent / shard}: missing, '{index_file.name}' names it. Download it too."
            )
        tensors |= read_tensors(index_file.parent / shard)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(f"{index_file}: its shards lack {_some(lost)}. Download them again.")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    with reading(path, SAFETENSORS, AGAIN, SafetensorError, error=CheckpointError), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def read_json(path: Path) -> dict[str, object]:
    with reading(path, JSON, AGAIN, ValueError, RecursionError, error=CheckpointError):
        content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _read_safetensors(path: Path) -> StateDict:
    with reading(path, SAFETENSORS, AGAIN, SafetensorError, error=CheckpointError), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _read_torch(path: Path) -> StateDict:
    # DiT's train.py stores its argparse.Namespace beside the weights: plain data, and the only class let through.
    allowed, caught = torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings()
    # a damaged pickle or archive fails with almost any class
    with reading(path, TORCH, AGAIN, Exception, error=CheckpointError), allowed, caught:
        warnings.simplefilter("ignore")  # torch warns about the pickle protocol of damaged files; our line says more
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: {_refusal(str(error))}") from error
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(_is_entry(*item) for item in content.items()):
        raise CheckpointError(
            f"{path}: expected a state dict of tensors, flat or under 'ema', found {_describe(content)}. "
            "Pass a DiT checkpoint."
        )
    return dict(content)


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refusal(reason: str) -> str:
    """One line for what torch says in ten, some of which advise to load the file unsafely."""
    code = re.search(r"GLOBAL (\S+)", reason)
    if code:
        return (
            f"refused: it holds pickled code ('{code[1]}'), which loading would run; expected tensors alone. "
            "Convert it to safetensors if you trust it."
        )
    detail = re.search(r"Unsupported operand \d+", reason)
    return f"not a PyTorch checkpoint, or a damaged one{f' ({detail[0]})' if detail else ''}. Get it again."


def _describe(content: object) -> str:
    if isinstance(content, dict):
        return f"a dict with keys {_some(map(str, content))}" if content else "an empty dict"
    return type(content).__name__


def check_layout(source: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names, shapes, types and finiteness of every tensor, or one line that names what is wrong."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        parts = [f"missing {_some(missing)}" * bool(missing), f"unexpected {_some(unexpected)}" * bool(unexpected)]
        raise CheckpointError(
            f"{source}: its tensors are not those of its network: {'; '.join(filter(None, parts))}. "
            "Pass a published DiT checkpoint or a diffusers DiTTransformer2DModel directory."
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: '{name}' has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)} "
                "from the other tensors. The checkpoint is inconsistent; get it again."
            )
        if tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{source}: '{name}' holds {tensor.dtype}, expected float16, bfloat16, float32 or float64. "
                "Pass the checkpoint from before it was quantized."
            )
        if not _is_finite(tensor):
            raise CheckpointError(f"{source}: '{name}' holds NaN or infinite values. Use another checkpoint.")


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves it in one fast pass; a sum may also overflow, and then every value is looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _some(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_number(path: Path, settings: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of a JSON file, or `default` if it is not there."""
    value = settings.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{path}: '{name}' is {value!r}, expected a number. Get the file again.")
    return value
