"""Pipelines of diffusers through the whole flow: record, calibrate, export, build, sample without PyTorch, the drop-in.

Weights are random; the classes, their layout and the pipelines' loops are diffusers' own.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

import tqdit
from support import few, made_once
from tqdit.engines.bundle import read_manifest
from tqdit.errors import TqditWarning, UsageError
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.load import load_model
from tqdit.models.recording import Recording
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import read_scale_table
from tqdit.sampling import noise
from zoo.pipelines import FAMILIES, NOT_LINEAR

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers about diffusers
]

STEPS = 6
SEED = 7
KNOBS = {"preset": "tq-dit", "groups": 3, "rows_per_group": 4, "candidates": 20, "rounds": 1, "token_share": 0.5}
CPU = ("onnxruntime", "openvino")
ROW_BY_ROW = {"chroma", "lumina2", "z-image"}  # their code makes lists of rows
LINEAR = [name for name in FAMILIES if name not in NOT_LINEAR]


def relative(found, expected):
    found, expected = (np.asarray(array, np.float64).ravel() for array in (found, expected))
    return np.square(found - expected).sum() / np.square(expected).sum()


def call(pipeline, arguments, **more):
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        result = pipeline(num_inference_steps=STEPS, output_type="latent", return_dict=False, **arguments, **more)
    return result[0]


def as_given(name, state, shape):
    """One row of a network's state as the pipeline takes latents, whose shape in what it gives is `shape`."""
    if name == "flux2":  # tokens of an image of 4 x 4 patches; the pipeline packs them
        return state.T.reshape(1, -1, 4, 4)
    return state.reshape(shape)  # a network may see an axis more


def seeded():
    return torch.Generator().manual_seed(0)


def in_pipeline(name, engine):
    """What the pipeline makes with an engine in the place of its transformer."""
    pipeline, arguments = FAMILIES[name]()
    pipeline.transformer = tqdit.DropIn.open(engine)
    return call(pipeline, arguments, generator=seeded())


# Packed latents and recorded guidance; convolutions in the blocks; a video; a network that is recorded alone. Another
# family is another class of diffusers in the same code.
KEPT = ("flux", "sana", "wan", "qwen-image")


@pytest.fixture(params=few(FAMILIES, *KEPT))
def family(request):
    """A name, and the folder with its calls, scales, engines, and the pipeline's latents."""
    return request.param, made_once(f"zoo-{request.param}", lambda folder: make(request.param, folder))


def make(name, folder):
    pipeline, arguments = FAMILIES[name]()
    with tqdit.record(pipeline.transformer if name in NOT_LINEAR else pipeline) as calls:
        np.save(folder / "latents.npy", call(pipeline, arguments, generator=seeded()).numpy())
    calls.recording().save(folder / "calls.safetensors")
    scales = folder / "scales.safetensors"
    table = tqdit.calibrate(pipeline.transformer, rows=folder / "calls.safetensors", output=scales, **KNOBS)
    model, config = load_model(pipeline.transformer, interface=table.interface), ExportConfig()
    for file, scales in (("float", None), ("model", table)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqditWarning)  # of those that take one row a call
            write(folder / f"{file}.onnx", *export_graph(model, config, scales))
    tqdit.build(folder / "float.onnx", folder / "float.engine", backend="onnxruntime")
    for backend in CPU:
        tqdit.build(folder / "model.onnx", folder / f"{backend}.engine", backend=backend)


def moved(array, rng):
    """With 1e-6 of noise, if it holds real numbers."""
    return (
        array * (1 + 1e-6 * rng.standard_normal(array.shape)).astype(np.float32) if array.dtype == np.float32 else array
    )


def sensitivity(name, table, expected):
    """What 1e-6 of noise on the inputs and on the parameters changes; the first layer's codes may hide the former."""
    rng = np.random.default_rng(0)
    network = FAMILIES[name]()[0].transformer
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.from_numpy(moved(parameter.numpy(), rng)))
    model = load_model(network, interface=table.interface)
    quantized = apply(model, replace(table, fingerprint=model.fingerprint))
    return relative(quantized({port: moved(array, rng) for port, array in table.golden.inputs.items()}), expected)


def test_an_engine_is_integer_and_computes_the_fake_quantized_network(family):
    """1e-9 (relative square), or the sensitivity to 1e-6 of noise, which flips codes."""
    name, folder = family
    table = read_scale_table(folder / "scales.safetensors")
    expected = apply(load_model(FAMILIES[name]()[0].transformer, interface=table.interface), table)(table.golden.inputs)
    limit = max(1e-9, 4 * sensitivity(name, table, expected))
    for backend in CPU:
        manifest = read_manifest(folder / f"{backend}.engine")
        assert manifest.audit.fallen_back == ()
        assert manifest.audit.integer > 5
        assert manifest.verified is not None
        assert manifest.card.rows == (1 if name in ROW_BY_ROW else None)
        with tqdit.Denoiser.open(folder / f"{backend}.engine") as denoise:
            assert relative(denoise(**table.golden.inputs), expected) < limit


def test_the_drop_in_gives_the_pipelines_latents(family):
    name, folder = family
    expected = np.load(folder / "latents.npy")
    assert relative(in_pipeline(name, folder / "float.engine"), expected) < 1e-8
    assert relative(in_pipeline(name, folder / "onnxruntime.engine"), expected) < 1e-2  # measured 1e-4 to 3e-3


@pytest.mark.parametrize("family", few(LINEAR, *(name for name in KEPT if name in LINEAR)), indirect=True)
def test_the_loop_without_torch_gives_the_pipelines_latents(family):
    name, folder = family
    recording = Recording.load(folder / "calls.safetensors")
    with tqdit.Sampler.open(folder / "float.engine") as sampler:
        found = sampler.sample_latents(recording.requests, seed=SEED)
    start = torch.from_numpy(noise.normal(SEED, 0, noise.INITIAL, found.shape[1:]))
    pipeline, arguments = FAMILIES[name]()
    expected = call(pipeline, arguments, latents=as_given(name, start, np.load(folder / "latents.npy").shape))
    assert relative(found, expected) < 1e-8


@pytest.mark.parametrize("family", few(["flux", "qwen-image", "lumina2"], "flux", "qwen-image"), indirect=True)
def test_recorded_calls_are_read_as_they_were_written(family, tmp_path):
    name, folder = family
    again = Recording.load(folder / "calls.safetensors").save(tmp_path / "again.safetensors")
    assert again.read_bytes() == (folder / "calls.safetensors").read_bytes()
    table = tqdit.calibrate(FAMILIES[name]()[0].transformer, rows=again, **KNOBS)
    assert table.to_bytes() == (folder / "scales.safetensors").read_bytes()


def test_in_python_it_is_four_calls(tmp_path):
    """A module in memory; its code makes lists of rows, which a warning says."""
    pipeline, arguments = FAMILIES["z-image"]()
    with tqdit.record(pipeline) as calls:
        expected = call(pipeline, arguments, generator=seeded())
    table = tqdit.calibrate(pipeline.transformer, rows=calls, **KNOBS)
    with pytest.warns(TqditWarning, match="one row a call"):
        tqdit.export(pipeline.transformer, tmp_path / "m.onnx", scales=table)
    tqdit.build(tmp_path / "m.onnx", tmp_path / "m.engine", backend="openvino")
    assert relative(in_pipeline("z-image", tmp_path / "m.engine"), expected) < 1e-2


def test_an_argument_that_changes_a_step_is_refused():
    """The table of DDIM is that of eta = 0."""
    pipeline, arguments = FAMILIES["pixart-sigma"]()
    pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with pytest.raises(UsageError, match=r"DDIMScheduler.*eta = 0\.9"), tqdit.record(pipeline):
        call(pipeline, {**arguments, "eta": 0.9})


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_loop_that_is_not_linear_is_refused_with_its_residual(name):
    pipeline, arguments = FAMILIES[name]()
    with pytest.raises(UsageError, match=r"residual \d\.\de-0\d.*tqdit.record\(pipeline.transformer\)"), \
            tqdit.record(pipeline):  # fmt: skip
        call(pipeline, arguments)
