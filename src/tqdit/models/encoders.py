"""Text encoders of a pipeline's directory, made by transformers, whose large weights stay in their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tqdit.errors import TqditError
from tqdit.extras import need
from tqdit.models.state import find_shards, read_json
from tqdit.models.weights import Weights, hold


def open_encoders(root: Path, index: Mapping[str, Any], variant: str | None) -> tuple[dict[str, nn.Module], Weights]:
    """Those that can be, by their names in the index of the pipeline, in float32; the others are left to diffusers.

    variant: of the weights, such as fp16; an encoder without files of it has others. Their large parameters take
    address space and no memory, so they can be traced, but run only inside `Weights.lent`.
    """
    found: dict[str, nn.Module] = {}
    weights = Weights()
    for part, told in index.items():
        is_name = part.startswith("text_encoder") and part.isidentifier()  # and no way out of the directory
        if is_name and isinstance(told, list) and told[:1] == ["transformers"]:
            opened = _open(str(told[-1]), root / part, variant)
            if opened is not None:
                found[part] = opened[0]
                weights = Weights({**weights.made, **opened[1].made})
    return found, weights


def _open(name: str, folder: Path, variant: str | None) -> tuple[nn.Module, Weights] | None:
    """None if only diffusers itself can load it: other files, other types, weights that are made of several tensors."""
    transformers: Any = need("transformers", "diffusers", "exporting text encoders")
    kind, file = getattr(transformers, name, None), _weights_file(folder, variant)
    shards = None if file is None else find_shards(file)
    if shards is None or not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return None
    if "quantization_config" in read_json(folder / "config.json"):
        return None
    values, weights = hold(shards)
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
        network: nn.Module = kind.from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=dict(values), torch_dtype=torch.float32, low_cpu_mem_usage=True,
            local_files_only=True,
        )  # fmt: skip
    except TqditError:
        raise
    except Exception:  # of any kind: transformers itself says what is wrong
        return None
    return (network.eval().requires_grad_(False), weights) if _is_made_of(network, values, weights) else None


def _weights_file(folder: Path, variant: str | None) -> Path | None:
    """The safetensors file that diffusers takes, or the index of some."""
    names = ["model.safetensors", "model.safetensors.index.json"]
    if variant is not None:
        names = [f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json", *names]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _is_made_of(network: nn.Module, values: Mapping[str, Tensor], weights: Weights) -> bool:
    """Whether each parameter is one of these tensors, and tensors that were left out are equal to the one in use.

    transformers gives random values to those that it does not find, and computes some from several tensors. It ties two
    names to one parameter if their tensors, which are without content here, are equal.
    """
    given = {tensor.untyped_storage().data_ptr(): name for name, tensor in values.items()}
    places: dict[int, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        place = parameter.untyped_storage().data_ptr()
        if place not in given:
            return False
        places[place] = places.get(place, 0) + 1
    unused = [values[name] for place, name in given.items() if place not in places]
    tied = [values[given[place]] for place, count in places.items() if count > 1]
    return all(
        torch.equal(weights.read(one), weights.read(other))
        for one in tied for other in unused if one.shape == other.shape
    )  # fmt: skip
