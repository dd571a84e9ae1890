"""The demo model makes glyphs that its judge recognises; the judge recognises real ones."""

import numpy as np
import pytest
import torch

from tqdit.cli.main import run
from tqdit.demo import weights
from tqdit.demo.glyphs import CLASSES, IMAGE_SIZE, draw
from tqdit.demo.judge import load_judge, recognised, wilson_interval
from tqdit.errors import CheckpointError
from tqdit.models.load import load_model


def test_drawings_are_reproducible_balanced_and_varied():
    images, labels = draw(64, seed=3)
    again, _ = draw(64, seed=3)
    np.testing.assert_array_equal(images, again)
    assert images.shape == (64, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.bincount(labels).tolist() == [4] * len(CLASSES)
    assert len({image.tobytes() for image in images}) == 64


def test_the_judge_knows_fresh_drawings():
    images, labels = draw(480, seed=99)
    assert recognised(images, labels, load_judge()).mean() >= 0.99


def test_the_model_is_what_its_page_says():
    model = load_model("demo")
    config = model.network.config
    assert (config.depth, config.input_size // config.patch_size, config.learns_variance) == (6, 8, True)
    assert (model.signature.label.choices, model.class_names) == (16, tuple(CLASSES))
    assert sum(p.numel() for p in model.network.parameters()) == 1_878_552
    assert all(torch.isfinite(p).all() for p in model.network.parameters())


@pytest.mark.parametrize(("name", "load"), [
    ("model.safetensors", lambda: load_model("demo")), ("judge.safetensors", load_judge),
])  # fmt: skip
def test_shipped_weights_are_used_as_they_were_shipped(tmp_path, monkeypatch, name, load):
    load()
    content = bytearray((weights.FOLDER / name).read_bytes())
    content[-2000] ^= 1
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name}: altered since tqdit shipped it .* Install tqdit again\."):
        load()
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: missing; it comes with tqdit"):
        load()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_guided_samples_of_50_steps_are_recognised_in_nine_of_ten_cases(tmp_path, sampler):
    """64 chains; measured on 320: 99.7 % (DDPM) and 98.4 % (DDIM), so 90 % is no matter of luck."""
    onnx, engine, samples = (str(tmp_path / name) for name in ("m.onnx", "m.engine", "s.npz"))
    assert run("export", [onnx, "--float", "--steps", "50", "--sampler", sampler, "-q"]) == 0
    assert run("build", [onnx, "-o", engine, "-q"]) == 0
    assert run("sample", [engine, "-n", "64", "--guidance-scale", "2.5", "-o", samples, "-q"]) == 0
    with np.load(samples) as content:
        assert recognised(content["arr_0"], content["arr_1"]).mean() >= 0.9


def test_the_interval_holds_the_share_and_shrinks_with_the_count():
    low, high = wilson_interval(9, 10)
    assert low < 0.9 < high
    narrow_low, narrow_high = wilson_interval(900, 1000)
    assert narrow_high - narrow_low < high - low
    assert wilson_interval(10, 10)[1] <= 1
