"""Files that were cut short or have flipped bits: refused in one line, or read without a crash.

The SHA-256 of a bundle's parts and of shards tells every change: they are refused, or give the same images. No file
says whether the others were changed, since users may edit them: there the promise is no crash, no hang, no traceback,
and that values which cannot be (NaN, negative scales, wrong shapes) are refused.
"""

import shutil

import numpy as np
import onnx
import pytest

from hardening.damage import cuts, flipped
from support import rounds
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import TqditError
from tqdit.evaluate.samples import read_images
from tqdit.quantization.table import read_scale_table, write_scale_table

READERS = {
    "scales.safetensors": ["inspect"], "model.onnx": ["inspect"], "samples.npz": ["inspect"],
    **{name: ["inspect", "--heads", "2"] for name in ("dit.safetensors", "zip.pt", "legacy.pt")},
}  # fmt: skip
QUIET = ["--backend", "onnxruntime", "-q"]
CUTS, FLIPS = 60, rounds(100)  # of each kind at most


@pytest.fixture
def spoilt(inputs, tmp_path):
    """spoilt(name, data) -> path of a file of that name with this content."""

    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        path.with_suffix(".json").write_text('{"num_classes": 5}')  # a model card, for checkpoints
        return path

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_was_cut_anywhere_is_refused(inputs, spoilt, run, name):
    data = (inputs / name).read_bytes()
    assert run(*READERS[name], inputs / name).code == 0
    for length in cuts(name, data, CUTS):
        outcome = run(*READERS[name], spoilt(name, data[:length]))
        if outcome.code == 0:  # a protobuf message that ends with a whole field is a message
            assert name == "model.onnx"
            onnx.load_from_string(data[:length])
        else:
            outcome.check_refusal()


@pytest.mark.hardening
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("bits", [1, 30])
def test_flipped_bits_are_refused_or_read_without_a_crash(inputs, spoilt, run, name, bits):
    data, rng = (inputs / name).read_bytes(), np.random.default_rng(bits)
    for _ in range(FLIPS):
        run(*READERS[name], spoilt(name, flipped(data, rng, bits))).check_answer()


@pytest.mark.hardening
def test_the_lint_takes_any_bytes(inputs, spoilt, run):
    data, rng = (inputs / "model.onnx").read_bytes(), np.random.default_rng(0)
    for bits in np.repeat([1, 10, 100], rounds(60)):
        run("inspect", "--lint", spoilt("model.onnx", flipped(data, rng, bits))).check_answer()


@pytest.mark.hardening
@pytest.mark.parametrize("bits", [1, 30])
def test_samples_with_flipped_bits_are_refused_or_are_images(inputs, spoilt, bits):
    data, rng = (inputs / "samples.npz").read_bytes(), np.random.default_rng(1)
    refused = 0
    for _ in range(FLIPS):
        try:
            found = read_images(spoilt("samples.npz", flipped(data, rng, bits)))
        except TqditError:
            refused += 1
        else:
            assert found.pixels.dtype == np.uint8
            assert found.pixels.ndim == 4
            assert found.labels is None or len(found.labels) == len(found.pixels)
    assert refused > FLIPS / 2  # zip files have checksums


@pytest.mark.hardening
@pytest.mark.parametrize("bits", [1, 30])
def test_a_scale_table_with_flipped_bits_is_refused_or_a_table(inputs, spoilt, tmp_path, bits):
    """Whatever is accepted survives being written and read."""
    data, rng = (inputs / "scales.safetensors").read_bytes(), np.random.default_rng(4)
    refused = 0
    for _ in range(FLIPS):
        try:
            table = read_scale_table(spoilt("scales.safetensors", flipped(data, rng, bits)))
        except TqditError:
            refused += 1
        else:
            write_scale_table(tmp_path / "again.safetensors", table)
            assert read_scale_table(tmp_path / "again.safetensors") == table
    assert refused


@pytest.fixture
def bundle(inputs, tmp_path):
    return shutil.copytree(inputs / "model.engine", tmp_path / "model.engine")


@pytest.fixture(scope="module")
def image(inputs):
    """The first image of the unspoilt bundle."""
    with Sampler.open(inputs / "model.engine") as sampler:
        return sampler.sample([1])


def sample(run, bundle):
    """The image of a bundle, or None if it is refused."""
    output = bundle.parent / "s.npz"
    outcome = run("sample", bundle, "-n", "1", "--classes", "1", "-q", "-o", output)
    if outcome.code:
        outcome.check_refusal()
        assert not output.exists()
        return None
    with np.load(output) as content:
        found = content["arr_0"]
    output.unlink()
    return found


@pytest.mark.parametrize("part", ["manifest.json", "graph.onnx"])
def test_a_bundle_with_a_cut_file_is_refused(bundle, image, run, part):
    data = (bundle / part).read_bytes()
    for length in cuts(part, data, CUTS):
        (bundle / part).write_bytes(data[:length])
        found = sample(run, bundle)
        if found is not None:
            assert data[length:].strip() == b""  # only the last line break is missing
            np.testing.assert_array_equal(found, image)


@pytest.mark.hardening
@pytest.mark.parametrize("bits", [1, 10])
def test_a_bundle_with_flipped_bits_in_a_part_is_refused(bundle, run, bits):
    data, rng = (bundle / "graph.onnx").read_bytes(), np.random.default_rng(bits)
    for _ in range(FLIPS):
        (bundle / "graph.onnx").write_bytes(flipped(data, rng, bits))
        assert sample(run, bundle) is None


@pytest.mark.hardening
@pytest.mark.parametrize("bits", [1, 10])
def test_a_manifest_with_flipped_bits_is_refused_or_samples_an_image(bundle, image, run, bits):
    data, rng = (bundle / "manifest.json").read_bytes(), np.random.default_rng(bits)
    for _ in range(FLIPS):
        (bundle / "manifest.json").write_bytes(flipped(data, rng, bits))
        found = sample(run, bundle)
        assert found is None or found.shape == image.shape


@pytest.mark.parametrize("name", ["shards.json", "shard-00001.npz"])
def test_cut_shards_are_refused_or_made_again(inputs, tmp_path, run, name):
    folder = shutil.copytree(inputs / "shards", tmp_path / "shards")
    data = (folder / name).read_bytes()
    for length in cuts(name, data, 20):
        (folder / name).write_bytes(data[:length])
        merged = run("sample", "--merge", folder, "-o", tmp_path / "m.npz")
        if merged.code == 0:  # the last line break alone is missing
            assert data[length:].strip() == b""
        else:
            merged.check_refusal()
    assert run("sample", inputs / "model.engine", "-n", "5", "--shard-size", "2", "-q", "-o", folder).code in (0, 1)


@pytest.mark.hardening
@pytest.mark.parametrize("name", ["shards.json", "shard-00001.npz"])
def test_shards_with_flipped_bits_are_never_merged_into_other_images(inputs, tmp_path, run, name):
    folder, rng = shutil.copytree(inputs / "shards", tmp_path / "shards"), np.random.default_rng(2)
    assert run("sample", "--merge", folder, "-o", tmp_path / "good.npz").code == 0
    data = (folder / name).read_bytes()
    for _ in range(FLIPS):
        (folder / name).write_bytes(flipped(data, rng))
        outcome = run("sample", "--merge", folder, "-o", tmp_path / "m.npz")
        if outcome.code:
            outcome.check_refusal()
            continue
        with np.load(tmp_path / "m.npz") as found, np.load(tmp_path / "good.npz") as good:
            np.testing.assert_array_equal(found["arr_0"], good["arr_0"])
        (tmp_path / "m.npz").unlink()


@pytest.mark.hardening
@pytest.mark.parametrize("bits", [0, 1, 30])
def test_a_spoilt_onnx_file_ends_the_build_in_one_line_or_builds(inputs, tmp_path, commands, bits):
    """Cut (bits 0) or with flipped bits. Each in a child process, which a crash of the backend's compiler would end."""
    data, rng = (inputs / "model.onnx").read_bytes(), np.random.default_rng(3)
    spoils = (
        [flipped(data, rng, bits) for _ in range(rounds(10))] if bits
        else [data[:length] for length in cuts("model.onnx", data, rounds(10) + 1)]
    )  # fmt: skip
    for spoil in spoils:
        (tmp_path / "model.onnx").write_bytes(spoil)
        outcome = commands.run("build", tmp_path / "model.onnx", "-o", tmp_path / "model.engine", *QUIET)
        outcome.check_answer()
        if outcome.code:
            assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
        else:
            shutil.rmtree(tmp_path / "model.engine")
