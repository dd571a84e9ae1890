"""Reading tensors from files that somebody else wrote: safely, completely, with one clear line when it fails."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tqdit.errors import CheckpointError, TqditError
from tqdit.files import JSON, SAFETENSORS, TORCH, reading, stays_inside

StateDict = dict[str, Tensor]
AGAIN = "Get it again."
# In names of sections and tensors. The state of optimizers has averages of other things: exp_avg, square_avg, grad_avg.
AVERAGED = re.compile(r"(^|[._])(ema|shadow|averag|swa|polyak|(?<!exp_)(?<!square_)(?<!grad_)avg)", re.IGNORECASE)
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
MOST_JSON_BYTES = 64_000_000  # an index of shards needs 100 bytes a tensor
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path, folder: Path | None = None) -> StateDict:
    """All tensors of a checkpoint on the CPU; nothing is ever unpickled. Nested sections give dotted names.

    path: `.safetensors`, `.pt`, `.pth` or `.bin`, or the `.index.json` of a sharded checkpoint. folder: the model's
    own, which links must not leave; None: the user named this file, wherever it lies.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Pass a checkpoint, a diffusers directory or 'demo'.")
    if folder is not None:
        check_place(path, folder)
    if path.suffix == ".json":
        return _read_sharded(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def check_place(path: Path, folder: Path) -> None:
    """Refuse a link out of the model's own folder: it would read a file that nobody chose."""
    if not stays_inside(path, folder):
        raise CheckpointError(
            f"{path}: a link to '{path.resolve()}', outside '{folder}'. Refused; put the file itself there."
        )


def check_places(folder: Path, root: Path) -> None:
    """The same for every file of a directory that a library reads."""
    for file in folder.rglob("*"):
        check_place(file, root)


def find_prefix(source: object, names: Iterable[str], anchor: str) -> str:
    """What stands before the names of the network that holds the tensor `anchor`; '' if there is none.

    A prefix of a wrapper (`module.`, `_orig_mod.`, `model.`) or a section of a training checkpoint. Averaged weights
    (`ema`) go before others. Raises CheckpointError if several networks remain.
    """
    found = [name.removesuffix(anchor) for name in names if f".{name}".endswith(f".{anchor}")]
    found = [prefix for prefix in found if "ema" in re.split(r"[._]", prefix.lower())] or found
    if len(found) > 1:
        raise CheckpointError(
            f"{source}: it holds several networks, under {_some(found)}; expected one, or one of averaged weights "
            "('ema'). Save the one that you want alone."
        )
    return found[0] if found else ""


def find_network(source: object, tensors: Mapping[str, Tensor], anchor: str) -> StateDict:
    """The tensors of the network that holds `anchor`, without what stands before their names.

    Raises CheckpointError if there are averaged weights, too, which are not known to be those of a network.
    """
    prefix = find_prefix(source, tensors, anchor)
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    averaged = [name for name, tensor in others.items() if AVERAGED.search(name) and tensor.numel() > 1]
    if averaged and not AVERAGED.search(prefix):
        raise CheckpointError(
            f"{source}: its averaged weights {_some(averaged, 2)} are without the names of a network. Put them into "
            "the model (`copy_to` of the library that averaged them) and save that, or save the other weights alone."
        )
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name, tensor in found.items():
        if not _is_whole(tensor):
            raise CheckpointError(
                f"{source}: '{name}' claims {tuple(tensor.shape)} values and holds fewer. Get the checkpoint again."
            )
    return found


def _is_whole(tensor: Tensor) -> bool:
    """False for a sparse or an empty shell, and for one that repeats a few values, which would be huge in float32."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def unwrap(network: nn.Module, anchor: str) -> nn.Module:
    """The network that holds the tensor `anchor`, out of wrappers such as those of compiled or parallel ones."""
    return network.get_submodule(find_prefix(type(network).__name__, network.state_dict(), anchor).rstrip("."))


def load_weights(source: object, network: nn.Module, tensors: StateDict) -> nn.Module:
    """Put tensors into a network that has no memory yet: in float32, on the CPU, in eval mode.

    Those that are float32 on the CPU are not copied.
    """
    check_layout(source, tensors, network.state_dict())
    weights = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def _read_sharded(index_file: Path) -> StateDict:
    """All tensors of a sharded checkpoint, `*.index.json` beside its shards."""
    shards = _shards(index_file)
    tensors: StateDict = {}
    for shard in sorted(set(shards.values())):
        tensors |= read_tensors(shard, index_file.parent)
    _check_complete(index_file, shards, tensors)
    return tensors


def _shards(index_file: Path) -> dict[str, Path]:
    """The file of each tensor that an index names."""
    index = read_json(index_file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index_file}: no 'weight_map' of tensor names to shards. Download it again.")
    for shard in sorted(set(weight_map.values())):
        if not shard or Path(shard).name != shard or not shard.endswith(WEIGHT_SUFFIXES):
            raise CheckpointError(
                f"{index_file}: shard '{shard}' is not a file of weights in its folder. Download it again."
            )
        if not (index_file.parent / shard).is_file():
            raise CheckpointError(
                f"{index_file.parent / shard}: missing, '{index_file.name}' names it. Download it too."
            )
    return {str(name): index_file.parent / shard for name, shard in weight_map.items()}


def _check_complete(index_file: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    lost = sorted(set(expected) - set(found))
    if lost:
        raise CheckpointError(f"{index_file}: its shards lack {_some(lost)}. Download them again.")


def find_shards(path: Path) -> dict[str, Path] | None:
    """The file of each tensor in a safetensors checkpoint: one file, or an index of some. None for other files."""
    shards = _shards(path) if path.suffix == ".json" else None
    files = [path] if shards is None else sorted(set(shards.values()))
    if not all(file.suffix == ".safetensors" for file in files):
        return None
    found: dict[str, Path] = {}
    for file in files:
        check_place(file, path.parent)
        with _opened(file) as content:
            found |= dict.fromkeys(content.keys(), file)
    if shards is not None:
        _check_complete(path, shards, found)
    return found


def count_tensors(folder: Path) -> int:
    """Of all weights in a folder and its subfolders: at most so many in files other than safetensors."""
    count = 0
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            with suppress(TqditError), _opened(file) as content:  # a damaged one is refused if it is read
                count += len(content.keys())
        elif file.suffix in WEIGHT_SUFFIXES and file.is_file():
            count += file.stat().st_size // 100
    return count


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file; its values are read when they are used."""
    with _opened(path) as content:
        tensor: Tensor = content.get_tensor(name)
    return tensor


def read_text(path: Path) -> str:
    """A file of JSON. Raises ValueError if it is too large for one."""
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"it has more than {MOST_JSON_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def read_json(path: Path, folder: Path | None = None) -> dict[str, object]:
    """A JSON object. folder: as in `read_tensors`."""
    if folder is not None:
        check_place(path, folder)
    with reading(path, JSON, AGAIN, ValueError, RecursionError, error=CheckpointError):
        content: dict[str, object] = json.loads(read_text(path))
    return content


def _read_safetensors(path: Path) -> StateDict:
    with _opened(path) as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with reading(path, SAFETENSORS, AGAIN, SafetensorError, error=CheckpointError), safe_open(path, "pt") as content:
        yield content


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
    tensors = flatten(content)
    if not tensors:
        raise CheckpointError(
            f"{path}: expected a state dict of tensors, flat or in sections, found {_describe(content)}. "
            "Pass a DiT checkpoint."
        )
    return tensors


def flatten(content: object) -> StateDict:
    """The tensors of nested dicts, with dotted names; each dict once, since a pickle may hold one in itself.

    Modules and arrays count as their tensors. Of lists and of keys that are no text, only averaged weights are taken.
    """
    tensors: StateDict = {}
    sections: list[tuple[str, object, bool]] = [("", content, True)]
    seen = set()
    for prefix, section, is_named in sections:
        if id(section) in seen:
            continue
        seen.add(id(section))
        for name, value in _entries(section, is_list=bool(prefix)):
            whole, has_name = f"{prefix}{name}", is_named and isinstance(name, str)
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
                value = torch.from_numpy(value)
            if not isinstance(value, Tensor):
                sections.append((f"{whole}.", value, has_name))
            elif has_name or AVERAGED.search(whole):
                tensors[whole] = value
    return tensors


def _entries(section: object, is_list: bool) -> Iterable[tuple[object, object]]:
    if isinstance(section, nn.Module):
        section = section.state_dict()
    if isinstance(section, Mapping):
        return section.items()
    return enumerate(section) if is_list and isinstance(section, list | tuple) else ()


def _is_zip(path: Path) -> bool:
    """Whether it is an archive. Raises CheckpointError for a compressed one: what it unpacks to has no bound."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception:  # torch says what is damaged
        return True
    if not stored:
        raise CheckpointError(f"{path}: a compressed archive, which torch.save never writes. Get it again.")
    return True


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


def check_layout(source: object, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
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
        if not is_finite(tensor):
            raise CheckpointError(f"{source}: '{name}' holds NaN or infinite values. Use another checkpoint.")


def is_finite(tensor: Tensor) -> bool:
    # A finite sum proves it in one fast pass; a sum may also overflow, and then every value is looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _some(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_number(where: object, settings: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of a JSON file, or `default` if it is not there."""
    value = settings.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{where}: '{name}' is {value!r}, expected a number. Get the file again.")
    return value
