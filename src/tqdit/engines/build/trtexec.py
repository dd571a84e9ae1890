"""A file for NVIDIA's `trtexec`: `tqdit-build --trtexec DIR`.

    DIR/NAME.onnx, its weights, build.sh

The ONNX file is the one that `--backend tensorrt` gives to TensorRT's parser: custom ops as functions of standard ops,
all functions inlined, float parts in the float type, integer products that write it. `trtexec` compiles it on a machine
without tqdit. Its options are those of `trtexec --help` of TensorRT 10.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

from tqdit.card import GraphCard
from tqdit.engines.backends.tensorrt.builder import check_settings, halved_type, prepared_file
from tqdit.engines.build.prepare import prepared, settled
from tqdit.engines.config import BatchRange, BuildConfig, FloatType
from tqdit.files import check_only, whole_folder
from tqdit.onnx_file import OnnxFile

BACKEND = "tensorrt"
SCRIPT = "build.sh"
MARK = "# written by tqdit-build: "  # and the names of the folder's files


def write_trtexec(source: str | Path, folder: str | Path, config: BuildConfig | None = None) -> str:
    """Write `folder`, whole or not at all; the command of its script. Nothing is compiled, audited or verified.

    Raises what `build_engine` raises for the file and the settings, OutputError for a folder that holds anything else.
    """
    source, folder = Path(source), Path(folder)
    file = OnnxFile.read(source)
    card = file.own_card
    config = settled(file, card, BACKEND, config or BuildConfig())
    check_settings(config)
    changed = prepared(file, card, config.precision, cast(FloatType, config.float_type), folder)
    with whole_folder(folder, check_trtexec) as place, changed as (graph, card, _):
        with prepared_file(graph, place, inline=True, halved=halved_type(card, config)) as ready:
            assert ready is not None
            whole = OnnxFile.read(ready.file)
            whole.save_copy(whole.model, place)
        command = shlex.join(["trtexec", *(f"--{option}" for option in _options(source, card, config))])
        names = json.dumps([SCRIPT, f"{source.stem}.plan", *(path.name for path in place.iterdir())])
        text = f'#!/bin/sh\n{MARK}{names}\ncd "$(dirname "$0")" && {command} "$@"\n'
        (place / SCRIPT).write_text(text, encoding="utf-8")
        (place / SCRIPT).chmod(0o755)
    return command


def check_trtexec(folder: Path) -> None:
    """Raise OutputError if the folder holds anything else than the files that its script names: what an earlier call
    wrote, and the plan.
    """
    ours: list[str] = []
    with suppress(OSError, ValueError, IndexError):
        line = (folder / SCRIPT).read_text(encoding="utf-8").splitlines()[1]
        ours = json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else ours
    check_only(folder, ours.__contains__, "a folder for trtexec")


def _options(source: Path, card: GraphCard, config: BuildConfig) -> Iterator[str]:
    """Those of `trtexec`, without the dashes."""
    yield from (f"onnx={source.name}", f"saveEngine={source.stem}.plan", "stronglyTyped")
    if card.rows is None:
        rows = (config.batch or BatchRange()).rows(card.rows_per_image)
        for name, count in zip(("min", "opt", "max"), rows, strict=True):
            shapes = (f"{port}:{'x'.join(map(str, (count, *shape)))}" for port, shape in card.inputs.items())
            yield f"{name}Shapes={','.join(shapes)}"
    if config.workspace_bytes is not None:
        yield f"memPoolSize=workspace:{config.workspace_bytes / 2**20:g}"
    if config.optimization_level is not None:
        yield f"builderOptimizationLevel={config.optimization_level}"
    if config.timing_cache is not None:
        yield f"timingCacheFile={config.timing_cache.resolve()}"
    if config.device is not None:
        yield f"device={config.device}"
    flags = {
        "versionCompatible": config.version_compatible, "excludeLeanRuntime": config.lean_runtime == "exclude",
        "refit": config.refit, "allowWeightStreaming": config.weight_streaming,
    }  # fmt: skip
    yield from (flag for flag, wanted in flags.items() if wanted)
