"""A bundle as a model repository of NVIDIA's Triton Inference Server: `tqdit-build --triton DIR`.

    DIR/NAME/config.pbtxt, README.md, 1/model.py, 1/model.engine/

The layout and the fields of config.pbtxt are those of the server's documentation (model_repository.md,
model_configuration.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tqdit.engines.bundle import MANIFEST, Manifest
from tqdit.engines.run.sampler import has_pixels, image_size, makes_images
from tqdit.engines.run.triton_model import COUNT, ENGINE, GUIDANCE, IMAGES, LATENTS, SEED, STEPS
from tqdit.errors import OutputError
from tqdit.files import bring, whole_folder
from tqdit.version import __version__

CONFIG = "config.pbtxt"
MARK = "# written by tqdit-build"
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL"}
MODEL = '''"""The engine beside this file; see the README of the folder above."""

from tqdit.engines.run.triton_model import TritonPythonModel  # noqa: F401 (Triton looks for this name)
'''
README = """\
# {name}: a model of Triton Inference Server

An engine of tqdit {version} (backend {backend}) in Triton's Python backend, written by `tqdit-build --triton`. Such a
model has not been run with the server yet, only with a stand-in for its Python module.

1. Install what runs engines into the server's Python, which must be 3.11 or newer: the wheel `tqdit-runtime` with the
   extra `{backend}` (docs/runtime.md of tqdit tells how to make the wheel).
2. Start `tritonserver` with the folder above this one as its model repository.
3. Ask for pictures, as JSON (POST http://localhost:8000/v2/models/{name}/infer):

       {example}

Inputs: {inputs}. `seed`, `steps` and `guidance_scale` may be left out. The images of one request share a
batch; requests of one instance wait for one another.
"""


def check_triton(folder: Path, name: str) -> None:
    """Raise OutputError unless DIR/NAME is free or was written by `tqdit-build --triton`."""
    _check_place(folder / name)


def write_triton(bundle: Path, manifest: Manifest, folder: Path, name: str) -> Path:
    """Write the repository's folder DIR/NAME, whole or not at all; its path."""
    target = folder / name
    inputs = list(_inputs(manifest))
    gpu = manifest.backend.startswith("tensorrt") or manifest.target.get("provider", "CPU")[:3] != "CPU"
    fields = [
        f"{MARK} {__version__}", f"name: {_quoted(name)}", 'backend: "python"', "max_batch_size: 0",
        _listed("input", [_tensor(*each) for each in inputs]), _listed("output", [_tensor(*_output(manifest), False)]),
        _listed("instance_group", [f"count: 1 kind: {'KIND_GPU' if gpu else 'KIND_CPU'}"]),
    ]  # fmt: skip
    with whole_folder(target, _check_place) as temporary:
        for file in (MANIFEST, *manifest.files):
            bring(bundle / file, temporary / "1" / ENGINE / file)
        (temporary / "1" / "model.py").write_text(MODEL, encoding="utf-8")
        (temporary / CONFIG).write_text("\n".join(fields) + "\n", encoding="utf-8")
        required = [_example(*each[:3]) for each in inputs if not each[3]]
        text = README.format(
            name=name, version=__version__, backend=manifest.backend,
            inputs=", ".join(f"`{each[0]}`" for each in inputs), example=f'{{"inputs": [{", ".join(required)}]}}',
        )  # fmt: skip
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return target


def _inputs(manifest: Manifest) -> Sequence[tuple[str, str, Sequence[int], bool]]:
    """(name, type, dims, optional) of each."""
    ports = manifest.card.signature.request_values
    own = [(name, TYPES[port.dtype], (-1, *port.row_shape), False) for name, port in ports.items()]
    numbers = ((SEED, "TYPE_INT64"), (STEPS, "TYPE_INT32"), (GUIDANCE, "TYPE_FP32"))
    return [*(own or [(COUNT, "TYPE_INT64", (1,), False)]), *((name, kind, (1,), True) for name, kind in numbers)]


def _output(manifest: Manifest) -> tuple[str, str, Sequence[int]]:
    card = manifest.card
    if not makes_images(manifest):
        return LATENTS, "TYPE_FP32", (-1, *card.state_shape)
    size = image_size(card)
    assert size is not None
    frames = () if has_pixels(card) or card.vae is None or card.vae.frames is None else (card.vae.frames,)
    return IMAGES, "TYPE_UINT8", (-1, *frames, *size, 3)


def _example(name: str, kind: str, dims: Sequence[int]) -> str:
    """An input of one image in a request."""
    shape, data = [1, *dims[1:]], "[1]" if len(dims) == 1 else "[...]"
    return f'{{"name": "{name}", "datatype": "{kind.removeprefix("TYPE_")}", "shape": {shape}, "data": {data}}}'


def _tensor(name: str, kind: str, dims: Sequence[int], optional: bool) -> str:
    shape = ", ".join(map(str, dims))
    return f"name: {_quoted(name)} data_type: {kind} dims: [ {shape} ]{' optional: true' if optional else ''}"


def _quoted(text: str) -> str:
    """A string of protobuf's text format: its escapes of quotes, backslashes and line ends are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _listed(field: str, entries: Sequence[str]) -> str:
    inner = ",\n".join(f"  {{ {entry} }}" for entry in entries)
    return f"{field} [\n{inner}\n]"


def _check_place(target: Path) -> None:
    ours = False
    with suppress(OSError, UnicodeError):
        ours = (target / CONFIG).read_text(encoding="utf-8").startswith(MARK)
    if not ours and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target}: not a model that tqdit-build --triton wrote. Choose another folder.")
