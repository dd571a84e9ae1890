"""The flow in Python: `tqdit.calibrate`, `tqdit.export`, `tqdit.build`, `tqdit.Sampler` (docs/python.md).

    table = tqdit.calibrate("DiT-XL-2-256x256.pt", preset="fast")
    tqdit.export("DiT-XL-2-256x256.pt", "model.onnx", scales=table)  # or, without a calibration, preset="dynamic"
    tqdit.build("model.onnx", "model.engine")
    with tqdit.Sampler.open("model.engine") as sampler:
        images = sampler.sample([207, 360], seed=7)

A model is what the commands take as MODEL ('demo', a checkpoint, a diffusers directory), a network or a state dict in
memory, or what `tqdit.load_model` returned. Stages are imported when they are called: a machine that only samples needs
neither torch nor onnx.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdit.card import DEFAULT_ATTENTION
from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.extras import need, need_part
from tqdit.files import check_writable, lock_folder

if TYPE_CHECKING:
    from torch import nn

    from tqdit.card import AttentionForm, GraphName
    from tqdit.engines.bundle import Manifest
    from tqdit.engines.config import BuildConfig
    from tqdit.interface import Interface
    from tqdit.models.loaded import LoadedModel, Source
    from tqdit.models.model_card import ModelCard
    from tqdit.models.recorder import NetworkRecorder, Recorder
    from tqdit.models.recording import Recording
    from tqdit.quantization.table import ScaleTable

    Model = Source | Path | LoadedModel
    Calls = Recorder | NetworkRecorder | Recording | str | Path


def load_model(source: Source | Path, heads: int | None = None, card: ModelCard | None = None) -> LoadedModel:
    """Load `demo`, a DiT checkpoint (.pt, .safetensors), a diffusers directory, or a network or state dict in memory.

    heads: of one of unusual width. card: what its tensors do not tell; None: the JSON file beside it, if there is one.
    A network in memory keeps its state, and the model shares its float32 weights: do not train it meanwhile.
    Raises CheckpointError with one line that names the file and what is wrong with it. Warns (`TqditWarning`) if
    something had to be assumed.
    """
    _need_stage("calibrate", "tqdit.load_model")
    from tqdit.models.load import load_model as load

    return load(source, heads, card)


def record(pipeline: Any) -> Recorder | NetworkRecorder:
    """A context that records the calls of a diffusers pipeline's transformer and the steps of its scheduler.

        with tqdit.record(pipeline) as calls:
            pipeline("a red square", num_inference_steps=28)
        table = tqdit.calibrate(pipeline.transformer, rows=calls)

    Record whole chains, all with one number of steps and one resolution. `calls.recording().save(path)` keeps them.
    Raises UsageError, in `calibrate` or in the pipeline's call, for a loop that is not linear.

    pipeline: or a network alone, if there is no pipeline for it or none with such a loop. Its calls are recorded, and
    nothing about a loop: `Denoiser` and `DropIn` run the engine, `Sampler` does not.
    """
    _need_stage("calibrate", "tqdit.record")
    from torch import nn

    from tqdit.models.recorder import NetworkRecorder, Recorder

    return NetworkRecorder(pipeline) if isinstance(pipeline, nn.Module) else Recorder(pipeline)


def calibrate(
    model: Model = "demo", *, preset: str | None = None, backend: str | None = None, output: str | Path | None = None,
    work: str | Path | None = None, data: str | Path | None = None, rows: Calls | None = None, quiet: bool = True,
    **knobs: Any,
) -> ScaleTable:  # fmt: skip
    """Find the scales of a model; returns the scale table and writes it to `output` if that is given.

    preset, backend and knobs are those of tqdit-calibrate (`--weight-bits 6` is weight_bits=6); without a preset the
    bits and the backend decide it. work: folder for intermediate results, from which an interrupted call continues;
    None: a temporary one. data: an .npz of your own images or latents, with labels or an array for each request port.
    rows: recorded calls, or the file of them; for networks other than a DiT. Raises UsageError for a preset, a backend
    or a knob that does not exist.
    """
    _need_stage("calibrate", "tqdit.calibrate")
    from tqdit.calibration.config import PRESETS, default_preset
    from tqdit.calibration.data import read_data
    from tqdit.calibration.flow import calibrate as find_scales
    from tqdit.engines.backends import check_backend
    from tqdit.models.recording import as_recording
    from tqdit.quantization.table import write_scale_table

    if backend is not None:
        check_backend(backend)
    if preset is None:
        preset = default_preset(knobs.get("weight_bits", 8), knobs.get("activation_bits", 8), backend)
    if preset not in PRESETS:
        raise UsageError(f"preset '{preset}' is unknown; known are {', '.join(PRESETS)}.")
    unknown = sorted(set(knobs) - set(PRESETS[preset].to_json()))
    if unknown:
        raise UsageError(f"'{unknown[0]}' is not a knob; known are {', '.join(PRESETS[preset].to_json())}.")
    config = replace(PRESETS[preset], **knobs)
    if output is not None:
        check_writable(Path(output))
    recording = None if rows is None else as_recording(rows)
    loaded = _loaded(model, None if recording is None else recording.interface)
    images = recording if data is None else read_data(Path(data), loaded)
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="tqdit-")) if work is None else work
        folder = Path(temporary)
        stack.enter_context(lock_folder(folder))
        result = find_scales(loaded, config, folder, Console(quiet), images)
        if output is not None:
            write_scale_table(Path(output), result.table)
        result.folder.delete()
    return result.table


def export(
    model: Model, output: str | Path, *, scales: ScaleTable | str | Path | None = None, preset: str | None = None,
    graph: GraphName = "denoiser", steps: int | None = None, sampler: str | None = None, guided: bool = True,
    attention: AttentionForm = DEFAULT_ATTENTION, forecast: bool = False,
    vae: str | Path | nn.Module | None = None, text: Any = None, text_int8: bool = False,
    rows: Calls | None = None, force: bool = False,
) -> Path:  # fmt: skip
    """Write a model as one ONNX file, quantized if there are scales or a preset; returns its path.

    preset: in place of scales, 'dynamic': int8 without a calibration.
    steps, sampler: what the file proposes to whoever samples (fixed in a step graph). forecast: the graph also returns
    what its blocks add, from which an engine forecasts calls (`full_calls` of `Sampler.sample`). vae: diffusers VAE,
    its directory or in memory, whose decoder goes beside the file; None: that of the model's pipeline directory, if
    there is one.
    text: the recorded diffusers pipeline, or its directory, whose text encoders go beside the file; text_int8: with
    int8 weights. rows: as in `calibrate`; they tell how a pipeline's network is called if there are no scales.
    force: replace the file of another version of tqdit. The network is traced in this process, which PyTorch's exporter
    can end by a signal if the class was never tried; tqdit-export traces such a class in a child process. Large
    weights of a directory's transformer and text encoders stay in their files and are read one at a time.
    """
    _need_stage("export", "tqdit.export")
    from tqdit.calibration.without_rows import preset_without_rows, table_without_rows
    from tqdit.exporter.graph import ExportConfig, export_graph, interface_of
    from tqdit.exporter.onnx_writer import check_overwrite, write
    from tqdit.exporter.text import trace_text
    from tqdit.exporter.vae import find_decoder, load_decoder, trace_decoder
    from tqdit.models.directories import open_texts
    from tqdit.models.recording import as_recording
    from tqdit.models.weights import IN_MEMORY
    from tqdit.quantization.table import read_scale_table

    if preset is not None and scales is not None:
        raise UsageError(f"preset '{preset}' and scales each say how to quantize. Pass one of them.")
    chosen_preset = None if preset is None else preset_without_rows(preset)
    path = Path(output)
    check_writable(path)
    check_overwrite(path, force)
    config = ExportConfig(graph, steps, sampler, guided, attention, forecast=forecast)
    table = read_scale_table(Path(scales)) if isinstance(scales, str | Path) else scales
    interface = interface_of(table, rows)
    loaded = _loaded(model, interface)
    if chosen_preset is not None:
        table = table_without_rows(loaded, chosen_preset, None if rows is None else as_recording(rows))
    chosen = find_decoder(loaded, Path(vae) if isinstance(vae, str) else vae)
    decoder = None if chosen is None else load_decoder(chosen, loaded)
    if decoder is not None:
        loaded = replace(loaded, latents=decoder.latents)
    pipeline, weights = open_texts(str(text)) if isinstance(text, str | Path) else (text, IN_MEMORY)
    texts = None if pipeline is None else trace_text(pipeline, loaded, path.stem, text_int8, weights)
    traced, card = export_graph(loaded, config, table)
    write(path, traced, card, None if decoder is None else trace_decoder(decoder, loaded), texts)
    return path


def build(
    source: str | Path | Sequence[str | Path], output: str | Path | None = None, *, backend: str = "auto",
    config: BuildConfig | None = None, force: bool = False, cache: str | Path | None = None,
) -> Manifest:  # fmt: skip
    """Compile an ONNX file of ours into an engine bundle, prove that it is integer, and return its manifest.

    source: of several files of one network, such as forms of attention, the fastest on this machine is kept. output:
    the folder to write; None: the (first) file's name with .engine. backend: 'auto' is the best one that is installed
    and runs here. force: replace the engine of another version of tqdit. cache: a folder of engines that were built
    before with the same files, settings, libraries and GPU. Raises BackendError if a quantized product would run in
    float.
    """
    need("onnx", "build", "tqdit.build")
    from tqdit.engines.build.cache import build_cached
    from tqdit.engines.bundle import check_overwrite

    files = [Path(one) for one in ([source] if isinstance(source, str | Path) else source)]
    folder = files[0].with_suffix(".engine") if output is None else Path(output)
    check_writable(folder)
    check_overwrite(folder, force)
    return build_cached(files, folder, cache, backend, config)[0]


def _need_stage(extra: str, what: str) -> None:
    """Name the extra before an import fails somewhere inside."""
    need_part("tqdit.models", what)
    libraries = {"calibrate": ("torch", "safetensors"), "export": ("torch", "onnx", "onnx_ir", "onnxscript")}
    for library in libraries[extra]:
        need(library, extra, what)


def _loaded(model: Model, interface: Interface | None) -> LoadedModel:
    from tqdit.models.load import load_model as load
    from tqdit.models.loaded import LoadedModel

    return model if isinstance(model, LoadedModel) else load(model, interface=interface, in_memory=False)
