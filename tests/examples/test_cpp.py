"""examples/cpp: images from a bundle without Python, equal to `Sampler`'s."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import support
from tables import Kind, make_table
from tqdit import safetensors_file
from tqdit.cli import main as cli
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import MANIFEST
from tqdit.engines.config import BuildConfig
from tqdit.engines.run.sampler import Sampler
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CMAKE is None, reason="cmake is not installed"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed"),
]
LABELS, SEED, SCALE = [3, 0, 4], 11, 2.5


@pytest.fixture(scope="session")
def program():
    """The example, built by CMake as docs/engine-bundle.md says."""
    from openvino.utils import get_cmake_path

    def build(folder):
        command = [CMAKE, "-S", SOURCE, "-B", folder, f"-DOpenVINO_DIR={get_cmake_path()}"]
        for each in ([*command, "-DCMAKE_CXX_FLAGS=-Werror"], [CMAKE, "--build", folder]):
            done = subprocess.run(each, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

    return support.made_once("cpp-example", build) / "tqdit_sample"


@pytest.fixture(scope="session")
def engine_of(tmp_path_factory):
    """engine_of(pixels, quantized) -> folder of an OpenVINO bundle of the tiny model."""
    made = {}

    def build(pixels=True, quantized=False):
        key = pixels, quantized
        if key not in made:
            folder = tmp_path_factory.mktemp("cpp")
            table = make_table(support.tiny_model(pixels=pixels), Kind(groups=10)) if quantized else None
            write(folder / "model.onnx", *support.exported(ExportConfig(), pixels=pixels, table=table))
            build_engine(folder / "model.onnx", folder / "model.engine", "openvino", BuildConfig())
            made[key] = folder / "model.engine"
        return made[key]

    return build


def run(program, *words):
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=120)


def save_noise(engine, folder, *flags, count=3):
    code = cli.sample([
        str(engine), "-n", str(count), "--seed", str(SEED), "-o", str(folder / "theirs.npz"), "-q",
        "--save-noise", str(folder / "noise.safetensors"), *flags,
    ])  # fmt: skip
    assert code == 0
    return folder / "noise.safetensors"


def sample(program, engine, noise, folder, *flags):
    """(states as a flat array, pixels as a flat array) that the program makes."""
    done = run(
        program, engine, noise, folder / "ours.ppm", "--states", folder / "states", "--classes", "3,0,4",
        "--guidance-scale", SCALE, "--threads", 1, *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(folder / "ours.ppm")]
    return np.fromfile(folder / "states", np.float32), support.read_picture(folder / "ours.ppm").ravel()


@pytest.mark.parametrize(("sampler", "quantized"), support.few(
    itertools.product(["ddim", "ddpm", "dpm++2m-sde", "deis"], [False, True]),
    ("ddim", False), ("ddpm", True), ("dpm++2m-sde", True), ("deis", True),
))  # fmt: skip
def test_states_and_images_equal_those_of_sampler_bit_for_bit(program, engine_of, tmp_path, sampler, quantized):
    engine = engine_of(quantized=quantized)
    noise = save_noise(engine, tmp_path, "--sampler", sampler, "--steps", "7")
    states, pixels = sample(program, engine, noise, tmp_path)
    with Sampler.open(engine, threads=1) as sampling:
        chosen = {"guidance_scale": SCALE, "seed": SEED, "steps": 7, "sampler": sampler}
        expected = sampling.sample_latents(LABELS, **chosen)
        images = sampling.sample(LABELS, **chosen)
    assert states.tobytes() == expected.tobytes()
    assert pixels.tobytes() == images.tobytes()
    assert np.ptp(images) > 50


def test_latents_are_decoded_and_batches_change_nothing(program, tmp_path):
    build_engine(support.file_with_decoder(), tmp_path / "model.engine", "openvino", BuildConfig())
    noise = save_noise(tmp_path / "model.engine", tmp_path, "--sampler", "ddim")
    _, pixels = sample(program, tmp_path / "model.engine", noise, tmp_path, "--batch", 2)
    with Sampler.open(tmp_path / "model.engine", threads=1) as sampling:
        images = sampling.sample(LABELS, SCALE, SEED, sampler="ddim")
    with Image.open(tmp_path / "ours.ppm") as picture:
        assert picture.size == (16, 48)
    assert pixels.tobytes() == images.tobytes()


@pytest.fixture
def inputs(engine_of, tmp_path):
    """A folder with a bundle and its noise, free to be damaged."""
    shutil.copytree(engine_of(), tmp_path / "e")
    save_noise(tmp_path / "e", tmp_path, "--sampler", "ddim", "--steps", "2", count=1)
    return tmp_path


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_card(file, **changes):
    change_json(file, card=json.loads(file.read_text())["card"] | changes)


def change_noise(file, array=None, **changes):
    """Facts of a noise file, or its noise."""
    metadata, arrays = safetensors_file.read(file)
    facts = json.loads(metadata["tqdit_noise"]) | changes
    if array is not None:
        arrays["noise"] = array
    shapes = {name: (values.dtype, values.shape) for name, values in arrays.items()}
    header = safetensors_file.header({"tqdit_noise": json.dumps(facts)}, shapes)
    file.write_bytes(header + b"".join(values.tobytes() for values in arrays.values()))


def noise_of_ddpm(folder):
    """A file whose table adds noise that it does not hold."""
    file = save_noise(folder / "e", folder, "--steps", "2", count=1)
    change_noise(file, safetensors_file.read(file)[1]["noise"][:1])


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


PLACES = ("e", "noise.safetensors", "ours.ppm")
MISTAKES = {
    "no bundle": (lambda _: ("nothing", *PLACES[1:]), "nothing: not an engine bundle"),
    "backend": (lambda f: change_json(f / "e" / MANIFEST, backend="onnxruntime"), "built for onnxruntime"),
    "format": (lambda f: change_json(f / "e" / MANIFEST, format_version=2), "format 2, this program reads format 3"),
    "manifest": (lambda f: (f / "e" / MANIFEST).write_text("{" * 9999), "expected JSON"),
    "manifest too deep": (lambda f: (f / "e" / MANIFEST).write_text("[" * 9999), "less depth"),
    "no card": (lambda f: change_json(f / "e" / MANIFEST, card=1), "'card': expected an object"),
    "part": (lambda f: cut(f / "e" / "graph.bin"), "graph.bin: missing, truncated"),
    "path": (lambda f: change_json(f / "e" / MANIFEST, entry="../graph.xml"), "../graph.xml: missing"),
    "no noise": (lambda _: ("e", "nothing.safetensors", PLACES[2]), "nothing.safetensors: cannot be read"),
    "noise cut": (lambda f: cut(f / PLACES[1]), "'noise' is damaged"),
    "noise of text": (lambda f: (f / PLACES[1]).write_text("Dear diary, today"), "not a safetensors file"),
    "noise of another model": (lambda f: change_noise(f / PLACES[1], fingerprint="0"), "another model"),
    "format of the noise": (lambda f: change_noise(f / PLACES[1], format_version=7), "format 7"),
    "shape of the noise": (
        lambda f: change_noise(f / PLACES[1], np.zeros((1, 1, 4, 8, 8), np.float32)), "noise of another shape"
    ),
    "no draws": (lambda f: change_noise(f / PLACES[1], np.zeros((0, 1, 3, 8, 8), np.float32)), "belong together"),
    "no noise of steps": (lambda f: noise_of_ddpm(f), "no noise of steps"),
    "no images": (lambda f: change_noise(f / PLACES[1], np.zeros((1, 0, 3, 8, 8), np.float32)), "belong together"),
    "class": (lambda _: (*PLACES, "--classes", "1,6"), "class 6; expected 0..5"),
    "guidance": (lambda _: (*PLACES, "--guidance-scale", "nan"), "--guidance-scale is 'nan'"),
    "batch": (lambda _: (*PLACES, "--batch", "0"), "--batch is 0"),
    "option": (lambda _: (*PLACES, "--colour", "red"), "--colour"),
    "no decoder": (lambda f: change_card(f / "e" / MANIFEST, latents={"scale": 1.0, "shift": 0.0}), "no decoder"),
    "step graph": (lambda f: change_card(f / "e" / MANIFEST, graph="step"), "step graph"),
    "correction": (lambda f: change_card(f / "e" / MANIFEST, correction={"slope": [0.1]}), "take back the network's"),
    "arguments": (lambda _: ("e",), "Usage: tqdit_sample ENGINE NOISE"),
    "place of the output": (lambda _: (*PLACES[:2], "nothing/ours.ppm"), "nothing/ours.ppm: cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_no_output(program, inputs, mistake):
    make, says = MISTAKES[mistake]
    words = make(inputs)
    done = subprocess.run(
        [program, *(words if isinstance(words, tuple) else PLACES)], cwd=inputs, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert done.stderr.startswith("tqdit_sample: ")
    assert done.stderr.count("\n") == 1
    assert not list(inputs.glob("*.ppm*"))


def test_without_options_it_samples_all_classes_at_the_model_s_guidance(program, inputs):
    assert subprocess.run([program, *PLACES], cwd=inputs).returncode == 0
    with Sampler.open(inputs / "e") as sampling:
        expected = sampling.sample([0], seed=SEED, sampler="ddim", steps=2)
    assert np.array_equal(support.read_picture(inputs / "ours.ppm"), expected[0])
