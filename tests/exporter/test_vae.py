"""The VAE decoder beside a latent model: exported from diffusers' AutoencoderKL, carried by the bundle."""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import onnxruntime as ort
import pytest
import torch

import support
import tqdit
from support import save_vae
from tqdit.card import Latents
from tqdit.cli.main import run
from tqdit.engines.build.engine import build_engine
from tqdit.engines.run.sampler import Sampler, to_pixels
from tqdit.errors import CheckpointError, FileFormatError, TqditWarning
from tqdit.exporter.vae import load_decoder
from tqdit.models.model_card import ModelCard
from tqdit.models.vae import read_latents
from tqdit.onnx_file import read_card

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a file, its decoder and its engine, and the decoder. `tiny` alone has Stable Diffusion's scale."""
    folder = shutil.copytree(support.file_with_decoder().parent, tmp_path_factory.mktemp("vae"), dirs_exist_ok=True)
    assert read_card(folder / "model.onnx").latents == Latents(0.5, 0.1)
    build_engine(folder / "model.onnx", folder / "model.engine")
    return folder, diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()


def test_the_decoder_is_diffusers_own(exported):
    """Same float32 convolutions in another library: 1e-4 of images in about -1..1."""
    folder, vae = exported
    with Sampler.open(folder / "model.engine") as sampler:
        latents = sampler.sample_latents([0, 1, 2], seed=1)
        images = sampler.sample([0, 1, 2], seed=1)
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents) / 0.5 + 0.1).sample.numpy()
    assert images.shape == (3, 16, 16, 3)
    assert np.abs(images.astype(int) - to_pixels(expected).astype(int)).max() <= 1  # truncation to uint8


def test_the_decoder_holds_nothing_of_the_exporting_machine(exported):
    (decoder,) = exported[0].glob("model.vae-*.onnx")
    assert b".py" not in decoder.read_bytes()


def test_a_decoder_saved_as_a_variant_is_the_same(exported, tmp_path):
    folder, vae = exported
    vae.save_pretrained(tmp_path, variant="fp16")
    model = replace(support.tiny_model(), latents=Latents(0.5, 0.1))
    found, expected = (
        load_decoder(tmp_path, model).vae.state_dict(),
        load_decoder(folder / "vae", model).vae.state_dict(),
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_decoder_behind_a_link_out_of_its_directory_is_refused(exported, tmp_path):
    folder, _ = exported
    vae = shutil.copytree(folder / "vae", tmp_path / "vae")
    weights = vae / "diffusion_pytorch_model.safetensors"
    secret = weights.rename(tmp_path / "secret")
    weights.symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: a link to '.*secret', outside"):
        load_decoder(vae, support.tiny_model())


def test_the_bundle_is_complete_without_the_onnx_files(exported, tmp_path, capsys):
    folder, _ = exported
    alone = shutil.copytree(folder / "model.engine", tmp_path / "moved.engine")
    output = tmp_path / "s.png"
    assert run("sample", ["-q", str(alone), "-n", "4", "-o", str(output)]) == 0
    assert support.read_picture(output).shape == (2 * 64 + 2, 2 * 64 + 2, 3)


def test_states_are_scaled_and_shifted_to_codes(exported):
    """The decoder's graph alone, against diffusers' decoder: 1e-5 of images in about -1..1."""
    folder, vae = exported
    (file,) = folder.glob("*.vae-*.onnx")
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    (images,) = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"latents": latents})
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents) / 0.5 + 0.1).sample.numpy()
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_decoder_that_looks_at_each_row_makes_one_image_a_call(exported, tmp_path):
    """`row_by_row` is what no graph with a free number of rows can hold."""
    folder, vae = exported

    def row_by_row(codes, **settings):
        return (torch.cat([type(vae).decode(vae, row[None], **settings)[0] for row in list(codes)]),)

    by_rows = save_vae(tmp_path / "vae")
    by_rows.decode = row_by_row
    with pytest.warns(TqditWarning, match="scale 0.5"):
        path = tqdit.export(support.tiny_model("diffusers"), tmp_path / "model.onnx", vae=by_rows, steps=4)
    assert read_card(path).vae.rows == 1
    assert read_card(folder / "model.onnx").vae.rows is None
    build_engine(path, tmp_path / "model.engine")
    with Sampler.open(tmp_path / "model.engine") as one, Sampler.open(folder / "model.engine") as many:
        images = one.sample([0, 1, 2], seed=1)
        expected = many.sample([0, 1, 2], seed=1)
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1


def test_the_card_names_the_decoder_and_its_image_size(exported):
    folder, _ = exported
    card = read_card(folder / "model.onnx")
    assert card.vae is not None
    assert (folder / card.vae.file).is_file()
    assert (card.vae.image_height, card.vae.image_width) == (16, 16)


def test_an_altered_or_missing_decoder_is_refused_at_build(exported, tmp_path):
    folder, _ = exported
    for file in folder.glob("*.onnx"):
        shutil.copy(file, tmp_path)
    card = read_card(tmp_path / "model.onnx")
    decoder = tmp_path / card.vae.file
    decoder.write_bytes(decoder.read_bytes() + b" ")
    with pytest.raises(FileFormatError, match=r"altered since .* was exported"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine")
    decoder.unlink()
    with pytest.raises(FileFormatError, match=r"missing; .* names it as its decoder"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine")


def test_a_vae_that_does_not_fit_is_refused(tmp_path):
    save_vae(tmp_path / "other", latent_channels=8)
    with pytest.raises(CheckpointError, match="latent_channels is 8, the model has 4"):
        load_decoder(tmp_path / "other", support.tiny_model())
    with pytest.raises(CheckpointError, match=r"works on images and needs no decoder.*model card"):
        load_decoder(tmp_path / "other", support.tiny_model(pixels=True))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_decoder(tmp_path, support.tiny_model())
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="'UNet2DModel', expected a VAE such as 'AutoencoderKL'"):
        load_decoder(tmp_path, support.tiny_model())


def test_a_scale_for_each_channel_is_refused_as_the_pipeline_does_not_apply_it(tmp_path):
    vae = save_vae(tmp_path / "vae")
    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 3.0, 4.0])
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=r"config\.json.*latents_mean and latents_std"):
        read_latents(tmp_path / "vae", tmp_path)


def test_what_a_card_tells_of_the_latents_goes_before_the_decoder(tmp_path):
    save_vae(tmp_path / "vae")  # scale 0.5, shift 0.1
    card = ModelCard(latent_scale=0.25)
    assert load_decoder(tmp_path / "vae", card.apply(support.tiny_model("diffusers"))).latents == Latents(0.25, 0.0)


def test_more_layers_than_tensors_are_refused_before_a_decoder_is_made(tmp_path):
    save_vae(tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_per_block": 10**9}))  # which would never end
    with pytest.raises(CheckpointError, match=r"vae: .* more than \d+ parameters, its files hold \d+ tensors"):
        load_decoder(tmp_path / "vae", support.tiny_model("diffusers"))
