"""Decoders of recorded pipelines: what lies between the loop's end and the VAE is learned, and runs in the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from PIL import Image

import tqdit
from support import few, made_once, read_picture
from tqdit.card import Layout
from tqdit.cli.main import run
from tqdit.errors import CheckpointError, TqditWarning, UsageError
from tqdit.exporter.vae import find_decoder, load_decoder, trace_decoder
from tqdit.models.decoding import learn_latents, to_codes
from tqdit.models.load import load_model
from tqdit.models.recorded import recorded_model
from tqdit.models.recording import Recording
from tqdit.onnx_file import read_card
from tqdit.sampling import noise
from zoo.pipelines import FAMILIES
from zoo.test_pipelines import STEPS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")]

RECORDED = ("flux", "sd3", "pixart-sigma", "sana", "wan")
DECODED = ("flux", "pixart-sigma", "sana", "wan")  # the decoder of sd3 is of the first one's class
ENGINES = ("flux", "sana", "wan")
SHOWN = ("sana", "wan")  # the layout of flux is learned below
SEED = 5


def images(pipeline, arguments, **more):
    """Pictures of the pipeline itself: (N, H, W, 3) or (N, F, H, W, 3) in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(num_inference_steps=STEPS, output_type="np", return_dict=False, **arguments, **more)[0]


def make(name, folder):
    """A decoder, and what the pipeline makes of the end of a loop; of `ENGINES` a float engine, and of other noise."""
    pipeline, arguments = FAMILIES[name]()
    with tqdit.record(pipeline) as calls:
        np.save(folder / "decoded.npy", images(pipeline, arguments, generator=torch.Generator().manual_seed(0)))
    recording = calls.recording()
    recording.save(folder / "calls.safetensors")
    model = recorded_model(pipeline.transformer, recording.interface)
    shape = (1, *model.signature.state.row_shape)
    np.save(folder / "end.npy", calls._runs[0].end.reshape(shape).numpy())
    if name not in DECODED:
        return
    if name not in ENGINES:
        ir.save(trace_decoder(load_decoder(pipeline.vae, model), model).model, folder / "model.vae-alone.onnx")
        return
    tqdit.export(model, folder / "model.onnx", vae=pipeline.vae)
    tqdit.build(folder / "model.onnx", folder / "model.engine", backend="onnxruntime")
    start = torch.from_numpy(noise.normal(SEED, 0, noise.INITIAL, shape))
    np.save(folder / "images.npy", images(pipeline, arguments, latents=start))


def made(name):
    return made_once(f"decoder-{name}", lambda folder: make(name, folder))


@pytest.mark.parametrize("name", few(DECODED, *SHOWN))
def test_a_decoder_s_graph_makes_the_pipeline_s_image(name):
    """2e-5 of images in 0..1: the same float32 convolutions in another library, and a learned scale."""
    folder = made(name)
    (file,) = folder.glob("*.vae-*.onnx")
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"latents": np.load(folder / "end.npy")})
    expected = np.load(folder / "decoded.npy")
    assert expected.std() > 0.01
    np.testing.assert_allclose(np.moveaxis(found / 2 + 0.5, 1, -1).clip(0, 1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", few(ENGINES, *SHOWN))
def test_an_engine_s_images_are_the_pipeline_s(name):
    """At most one of 255 levels, where rounding differs; 99 % of them are equal."""
    folder = made(name)
    expected = np.load(folder / "images.npy")
    with tqdit.Sampler.open(folder / "model.engine") as sampler:
        found = sampler.sample(sampler.read_requests(folder / "calls.safetensors"), seed=SEED)
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - np.round(255 * expected).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    vae = read_card(folder / "model.onnx").vae
    assert (vae.frames, vae.image_height, vae.image_width) == (5 if name == "wan" else None, *expected.shape[-3:-1])


@pytest.mark.parametrize("name", few(RECORDED, *SHOWN, "sd3"))
def test_facts_are_those_of_the_vae(name):
    latents = Recording.load(made(name) / "calls.safetensors").interface.latents
    vae = FAMILIES[name]()[0].vae
    assert latents.decoder == type(vae).__name__
    if name == "wan":
        np.testing.assert_allclose(latents.shift, vae.config.latents_mean, atol=1e-5)
        np.testing.assert_allclose(1 / np.array(latents.scale), vae.config.latents_std, rtol=1e-5)
    else:
        shift = vae.config.get("shift_factor") or 0.0
        np.testing.assert_allclose((latents.scale, latents.shift), (vae.config.scaling_factor, shift), atol=1e-5)
    packed = Layout(1, (4, 4, 4, 2, 2), (2, 0, 3, 1, 4), (4, 8, 8))
    assert (latents.layout == packed) == (name == "flux")


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("state", "codes", "change"), [
    ((4, 6, 8), (4, 6, 8), lambda x: x / 0.5 + 0.1),  # SD3
    ((3, 4, 6, 8), (4, 3, 6, 8), lambda x: x.transpose(0, 2, 1, 3, 4) * 3),  # CogVideoX
    ((16, 2, 4, 4), (16, 2, 4, 4), lambda x: x * np.arange(1, 17).reshape(16, 1, 1, 1) - 2),  # Wan
    ((12, 16), (4, 6, 8), lambda x: x.reshape(-1, 3, 4, 4, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(-1, 4, 6, 8)),
    ((12, 16), (4, 6, 8),  # Flux 2: patches before channels, and a scale for each
     lambda x: (x * np.arange(1, 17)).reshape(-1, 3, 4, 2, 2, 4).transpose(0, 5, 1, 3, 2, 4).reshape(-1, 4, 6, 8)),
    ((24, 16), (8, 2, 6, 4),  # LTX with patches of one frame
     lambda x: x[:, :, :].reshape(-1, 2, 3, 4, 8, 1, 2, 1).transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape(-1, 8, 2, 6, 4)),
])  # fmt: skip
def test_layouts_are_learned(state, codes, change):
    """In float32, and in half precision with its own tolerance."""
    x = random(2, *state)
    y = change(x).astype(np.float32)
    assert y.shape[1:] == codes
    latents = learn_latents(x, y, "AutoencoderKL", 1e-4)
    np.testing.assert_allclose(to_codes(torch.from_numpy(x), latents).numpy(), y, rtol=1e-4, atol=1e-4)
    half = y.astype(np.float16).astype(np.float32)
    found = learn_latents(x, half, "AutoencoderKL", 2e-2)
    np.testing.assert_allclose(to_codes(torch.from_numpy(x), found).numpy(), y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("change", [
    np.tanh, lambda x: x + random(*x.shape)[::-1] / 100, lambda x: x[:, ::-1], lambda x: x[..., :4]
])  # fmt: skip
def test_what_is_no_layout_is_refused_with_its_residual(change):
    x = random(2, 4, 8, 8)
    with pytest.raises(UsageError, match=r"AutoencoderKL.*least residual (\d\.\de[-+]\d\d|inf), expected"):
        learn_latents(x, np.ascontiguousarray(change(x)), "AutoencoderKL", 1e-4)


def test_a_pipeline_whose_codes_cannot_be_learned_is_recorded_with_a_warning():
    pipeline, arguments = FAMILIES["pixart-sigma"]()
    with tqdit.record(pipeline) as calls:
        images(pipeline, arguments)
    run = calls._runs[0]
    run.codes = [run.codes[0].tanh()]
    with pytest.warns(TqditWarning, match=r"engines of this recording make latents: .*AutoencoderKL.*residual"):
        assert calls.recording().interface.latents is None
    run.given = {"timestep"}
    with pytest.warns(TqditWarning, match=r"AutoencoderKL\.decode takes timestep beside the codes"):
        assert calls.recording().interface.latents is None


def test_a_pipeline_directory_brings_its_decoder(tmp_path):
    folder = made("sana")
    pipeline, _ = FAMILIES["sana"]()
    pipeline.transformer.save_pretrained(tmp_path / "transformer")
    pipeline.vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    model = load_model(str(tmp_path), interface=Recording.load(folder / "calls.safetensors").interface)
    assert find_decoder(model, None) == tmp_path / "vae"
    weights, expected = load_decoder(tmp_path / "vae", model).vae.state_dict(), pipeline.vae.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    with pytest.warns(TqditWarning, match="decoder is left out, since no recorded call used it"):
        assert find_decoder(replace(model, latents=None), None) is None
    with pytest.raises(CheckpointError, match="no decoded states were recorded"):
        load_decoder(tmp_path / "vae", replace(model, latents=None))
    with pytest.raises(CheckpointError, match="a VAE of class 'AutoencoderKL', expected 'AutoencoderDC'"):
        load_decoder(FAMILIES["sd3"]()[0].vae, model)


def test_a_sampled_video_is_a_gif_or_a_row_of_frames(tmp_path, capsys):
    folder = made("wan")
    arguments = [str(folder / "model.engine"), "-q", "--embeddings", str(folder / "calls.safetensors"), "--seed", "5"]
    for name in ("x.gif", "x.png", "x.npz"):
        assert run("sample", [*arguments, "-o", str(tmp_path / name)]) == 0
    with Image.open(tmp_path / "x.gif") as file:
        assert (file.n_frames, file.size) == (5, (64, 64))
    assert read_picture(tmp_path / "x.png").shape == (64, 5 * 64 + 4 * 2, 3)
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (1, 5, 16, 16, 3)
    still = made("sana")
    arguments[0], arguments[3] = str(still / "model.engine"), str(still / "calls.safetensors")
    capsys.readouterr()
    assert run("sample", [*arguments, "-o", str(tmp_path / "y.gif")]) == 1
    assert "makes pictures, not videos" in capsys.readouterr().err
