"""tqdit-sample --save-noise: what a program without Python needs beside the engine."""

import json
import shutil

import numpy as np
import pytest

import support
from tqdit import safetensors_file
from tqdit.cli import main as cli
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run import noise_file
from tqdit.errors import OutputError, UsageError
from tqdit.sampling import chains
from tqdit.sampling.noise import INITIAL


def save(engine, folder, *flags):
    file = folder / "noise.safetensors"
    assert cli.sample([str(engine), "-q", "-o", str(folder / "x.npz"), "--save-noise", str(file), *flags]) == 0
    metadata, arrays = safetensors_file.read(file)
    return json.loads(metadata[noise_file.METADATA_KEY]), arrays


def test_it_holds_the_schedule_and_the_noise_of_every_step(bundle, tmp_path):
    facts, arrays = save(bundle, tmp_path, "-n", "2", "--seed", "5")
    card = read_manifest(bundle).card
    schedule = card.sampling.schedule
    expected = {"format_version": 1, "fingerprint": card.fingerprint, "sampler": "ddpm", "steps": 20, "seed": 5}
    assert expected.items() <= facts.items()
    np.testing.assert_array_equal(arrays["coefficients"], chains.coefficients(schedule))
    np.testing.assert_array_equal(arrays["timesteps"], schedule.timesteps)
    assert arrays["initial_scale"] == schedule.initial_scale
    assert arrays["noise"].shape == (21, 2, *card.state_shape)
    for step in range(INITIAL, 20):
        np.testing.assert_array_equal(arrays["noise"][step + 1], support.normal_rows(5, [0, 1], step, card.state_shape))


def test_of_a_chain_without_noise_it_holds_the_initial_one(bundle, tmp_path):
    facts, arrays = save(bundle, tmp_path, "-n", "2", "--sampler", "ddim", "--steps", "3")
    assert (facts["sampler"], facts["steps"], len(arrays["timesteps"]), len(arrays["noise"])) == ("ddim", 3, 3, 1)


def test_the_samples_are_the_same_with_and_without_it(bundle, tmp_path):
    save(bundle, tmp_path, "-n", "2", "--steps", "3")
    assert cli.sample([str(bundle), "-q", "-o", str(tmp_path / "y.npz"), "-n", "2", "--steps", "3"]) == 0
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


def test_safetensors_own_reader_takes_it(bundle, tmp_path):
    from safetensors.numpy import load_file

    _, arrays = save(bundle, tmp_path, "-n", "1", "--steps", "2")
    theirs = load_file(tmp_path / "noise.safetensors")
    assert set(theirs) == {"coefficients", "initial_scale", "noise", "timesteps"}
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, arrays[name])


def test_only_a_noise_file_is_replaced(bundle, tmp_path):
    save(bundle, tmp_path, "-n", "1", "--steps", "2")
    assert len(save(bundle, tmp_path, "-n", "2", "--steps", "2")[1]["noise"]) == 3
    noise_file.check_noise_file(tmp_path / "another.safetensors")
    (tmp_path / "scales.safetensors").write_bytes(safetensors_file.header({"tqdit_scales": "{}"}, {}))
    with pytest.raises(OutputError, match=r"scales\.safetensors: exists"):
        noise_file.check_noise_file(tmp_path / "scales.safetensors")
    with pytest.raises(UsageError, match=r"noise\.npz"):
        noise_file.check_noise_file(tmp_path / "noise.npz")


def test_a_damaged_engine_leaves_no_noise_behind(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "e")
    (tmp_path / "e" / "graph.onnx").write_bytes(b"")
    noise = str(tmp_path / "n.safetensors")
    assert cli.sample([str(tmp_path / "e"), "-q", "-o", str(tmp_path / "x.npz"), "--save-noise", noise]) == 1
    assert not list(tmp_path.glob("*.*"))


def test_its_size_is_bounded(bundle, tmp_path):
    card = read_manifest(bundle).card
    row = 4 * np.prod(card.state_shape)
    most = int(noise_file.MOST_BYTES // (21 * row))
    noise_file.check_size(tmp_path / "n.safetensors", card, card.sampling, most)
    with pytest.raises(UsageError, match=rf"21 arrays of noise for each of {most + 1} images"):
        noise_file.check_size(tmp_path / "n.safetensors", card, card.sampling, most + 1)


def test_a_chain_with_forecasts_has_no_noise_file(bundle_of, tmp_path, capsys):
    """Loops in other languages make full calls alone. As many full calls as steps are no forecasts."""
    engine = bundle_of(forecast=True)
    flags = ["-n", "1", "--steps", "6", "-q", "-o", str(tmp_path / "x.npz")]
    noise = str(tmp_path / "n.safetensors")
    assert cli.sample([str(engine), *flags, "--full-calls", "4", "--save-noise", noise]) == 2
    message = capsys.readouterr().err
    for fact in ("--save-noise", "6 steps of ddpm, 4 of them with full calls", "--full-calls 6"):
        assert fact in message
    assert not list(tmp_path.iterdir())
    save(engine, tmp_path, *flags[:4], "--full-calls", "6")
