"""Files that were cut short or have flipped bits: refused in one line, or read as if nothing were wrong.

A sealed file carries checksums (bundle, shards: SHA-256; `.npz` and `.pt`: CRC-32 of the zip file), so a changed one is
refused or means the same: what its command says is compared with what it says of the intact one. The others, the ONNX
file and the scale table among them, carry none (docs/checksums.md): a flipped
bit of a weight makes another model, which only a digest kept elsewhere can tell, such as the fingerprint that
`tqdit-inspect` prints. There the promise is no crash, no hang and no traceback.
"""

import shutil

import numpy as np
import pytest

from hardening.blows import cuts, flipped
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import TqditError
from tqdit.evaluate.samples import read_images
from tqdit.quantization.table import read_scale_table

READERS = {
    "scales.safetensors": ["inspect"], "dit.safetensors": ["inspect"], "zip.pt": ["inspect", "--heads", "2"],
    "legacy.pt": ["inspect", "--heads", "2"], "model.onnx": ["inspect"], "samples.npz": ["inspect"],
}  # fmt: skip
SEALED = {"zip.pt", "samples.npz"}
QUIET = ["--backend", "onnxruntime", "-q"]
CUTS, FLIPS = 60, 300  # of each kind at most


@pytest.fixture
def spoilt(inputs, tmp_path):
    """spoilt(name, data) -> path of a file of that name with this content."""

    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_was_cut_anywhere_is_refused(inputs, spoilt, run, name):
    data = (inputs / name).read_bytes()
    assert run(*READERS[name], inputs / name).code == 0
    for length in cuts(name, data, CUTS):
        run(*READERS[name], spoilt(name, data[:length])).check_refusal()


@pytest.mark.hardening
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("bits", [1, 30])
def test_flipped_bits_are_refused_or_read_without_a_crash(inputs, tmp_path, spoilt, run, name, bits):
    data, rng = (inputs / name).read_bytes(), np.random.default_rng(bits)
    expected = run(*READERS[name], inputs / name)
    for _ in range(FLIPS):
        outcome = run(*READERS[name], spoilt(name, flipped(data, rng, bits)))
        if outcome.code != 0:
            outcome.check_refusal()
        else:
            assert outcome.err == expected.err == ""
            assert name not in SEALED or outcome.out == expected.out.replace(str(inputs), str(tmp_path))


@pytest.mark.hardening
def test_the_lint_takes_any_bytes(inputs, spoilt, run):
    data, rng = (inputs / "model.onnx").read_bytes(), np.random.default_rng(0)
    for bits in np.repeat([1, 10, 100], 60):
        outcome = run("inspect", "--lint", spoilt("model.onnx", flipped(data, rng, bits)))
        if outcome.code != 0:
            outcome.check_refusal()


@pytest.mark.hardening
def test_samples_with_flipped_bits_are_never_used(inputs, spoilt):
    """A zip file checks its members by CRC-32; the bits that it does not cover mean nothing."""
    data, rng = (inputs / "samples.npz").read_bytes(), np.random.default_rng(1)
    expected = read_images(inputs / "samples.npz")
    refused = same = 0
    for _ in range(FLIPS):
        try:
            found = read_images(spoilt("samples.npz", flipped(data, rng)))
        except TqditError as error:
            refused += "\n" not in str(error)
        else:
            np.testing.assert_array_equal(found.pixels, expected.pixels)
            np.testing.assert_array_equal(found.labels, expected.labels)
            same += 1
    assert refused + same == FLIPS
    assert refused > same


@pytest.mark.hardening
@pytest.mark.parametrize("bits", [1, 30])
def test_a_scale_table_with_flipped_bits_is_refused_or_has_valid_values(inputs, spoilt, bits):
    data, rng = (inputs / "scales.safetensors").read_bytes(), np.random.default_rng(4)
    refused = 0
    for _ in range(FLIPS):
        try:
            table = read_scale_table(spoilt("scales.safetensors", flipped(data, rng, bits)))
        except TqditError:
            refused += 1
        else:
            assert all(np.isfinite(array).all() for site in table.sites for array in site.arrays().values())
    assert refused > 0.5 * FLIPS


@pytest.fixture
def bundle(inputs, tmp_path):
    return shutil.copytree(inputs / "model.engine", tmp_path / "model.engine")


@pytest.fixture(scope="module")
def image(inputs):
    """The first image of the unspoilt bundle."""
    with Sampler.open(inputs / "model.engine") as sampler:
        return sampler.sample([1])


def check_bundle(run, bundle, image):
    """Refused, or the same image."""
    output = bundle.parent / "s.npz"
    outcome = run("sample", bundle, "-n", "1", "--classes", "1", "-q", "-o", output)
    if outcome.code:
        outcome.check_refusal()
        assert not output.exists()
        return False
    with np.load(output) as content:
        np.testing.assert_array_equal(content["arr_0"], image)
    output.unlink()
    return True


@pytest.mark.parametrize("part", ["manifest.json", "graph.onnx"])
def test_a_bundle_with_a_cut_file_is_refused_or_samples_the_same(bundle, image, run, part):
    data = (bundle / part).read_bytes()
    for length in cuts(part, data, CUTS):
        (bundle / part).write_bytes(data[:length])
        whole = check_bundle(run, bundle, image)
        assert not whole or data[length:].strip() == b""


@pytest.mark.hardening
@pytest.mark.parametrize("bits", [1, 10])
@pytest.mark.parametrize("part", ["manifest.json", "graph.onnx"])
def test_a_bundle_with_flipped_bits_is_refused_or_samples_the_same(bundle, image, run, part, bits):
    data, rng = (bundle / part).read_bytes(), np.random.default_rng(bits)
    for _ in range(FLIPS):
        (bundle / part).write_bytes(flipped(data, rng, bits))
        whole = check_bundle(run, bundle, image)
        assert not whole or part == "manifest.json"


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
@pytest.mark.parametrize("bits", [1, 30])
def test_a_spoilt_onnx_file_ends_the_build_in_one_line_or_builds(inputs, tmp_path, commands, bits):
    """In a child each, since what the backend's compiler does with it is not ours."""
    data, rng = (inputs / "model.onnx").read_bytes(), np.random.default_rng(3)
    cut = [data[:length] for length in cuts("model.onnx", data, 5)]
    for spoilt in [*cut, *(flipped(data, rng, bits) for _ in range(8))]:
        (tmp_path / "model.onnx").write_bytes(spoilt)
        outcome = commands.run("build", tmp_path / "model.onnx", "-o", tmp_path / "model.engine", "-q")
        if outcome.code:
            outcome.check_refusal()
            assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
        else:
            shutil.rmtree(tmp_path / "model.engine")
